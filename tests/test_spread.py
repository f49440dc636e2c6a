"""Numbers out of training: each bound stands clear of what other processors give."""

import ast

import machines
import pytest
import spread
from test_machines import holds_trained_numbers

ROWS = spread.table()
CALLS = list(spread.calls())


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: f"{row.test} {row.what}")
def test_bounds_lie_outside_of_what_was_measured(row):
    assert row.distance() >= row.room(), (
        f"{row.what} is {row.lowest:g} to {row.highest:g} on {row.runs} kinds of processor, too "
        f"near {row.bound:g}: let the test ask for something that holds more clearly"
    )
    assert row.runs >= spread.LEAST_RUNS, "measured on too few kinds of processor: `make spread`"


def test_all_that_is_measured_stands_in_the_table_and_nothing_else():
    def fits(row, call):
        return row.test == call[0] and call[1].fullmatch(row.what)

    assert [row for row in ROWS.values() if not any(fits(row, call) for call in CALLS)] == []
    assert [call for call in CALLS if not any(fits(row, call) for row in ROWS.values())] == []
    assert len(CALLS) > 40 and all("::test_" in test for test, _ in CALLS)


def test_what_is_measured_runs_on_every_processor():
    assert {test.partition("::")[0] for test, _ in CALLS} <= set(machines.NUMBERS)


def test_no_accuracy_of_a_trained_network_is_compared_unmeasured():
    """``assert evaluate(...) > 90`` would hold a bound of which nobody knows how near it is."""
    found = []
    for path in filter(holds_trained_numbers, spread.TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Lt | ast.Gt):
                text = ast.unparse(node)
                number = any(
                    isinstance(end, ast.Constant) for end in (node.left, *node.comparators)
                )
                if number and ("evaluate(" in text or "accuracy" in text):
                    found.append(f"{path.name}:{node.lineno} {text}")
    assert found == []


def test_a_number_has_to_keep_its_bound_and_to_stand_in_the_table(monkeypatch):
    test = "test_spread.py::test_a_number_has_to_keep_its_bound_and_to_stand_in_the_table"
    row = spread.Row(test, "points", "above", 3.0, 8.0, 9.0, 6)
    monkeypatch.setattr(spread, "table", lambda: {(test, "points"): row})
    monkeypatch.delenv("SPREAD_LOG", raising=False)
    spread.assert_above(3.5, 3, "points")
    for value in (3, 2, float("nan")):
        with pytest.raises(AssertionError, match="points: .* is not above 3"):
            spread.assert_above(value, 3, "points")
    for wrong in (
        lambda: spread.assert_above(8, 4, "points"),
        lambda: spread.assert_below(2, 3, "points"),
        lambda: spread.assert_above(8, 3, "bytes"),
    ):
        with pytest.raises(AssertionError, match="was not measured .*make spread"):
            wrong()


def test_ranges_are_those_of_all_variants_and_other_tests_stay_where_asked(tmp_path, monkeypatch):
    path, logs = tmp_path / "spread.csv", [tmp_path / name for name in "ab"]
    path.write_text("test,what,side,bound,lowest,highest,runs\nother,x,below,1.0,0.25,0.5,6\n")
    for log, values in zip(logs, ([5, 7], [4]), strict=True):
        monkeypatch.setenv("SPREAD_LOG", str(log))
        for value in values:
            spread.assert_above(value, 3, "points, of 10")
    with pytest.raises(AssertionError, match="bytes: 2 is not below 1"):  # and is logged
        spread.assert_below(2, 1, "bytes")
    for keep in (True, False):
        spread.write(logs, path, keep)
        *others, size, points = spread.table(path).values()
        assert points == (points.test, "points, of 10", "above", 3, 4, 7, 2)
        assert size.highest == 2
        assert [row.test for row in others] == ["other"] * keep


@pytest.mark.parametrize(
    "side, lowest, highest, distance, room",
    [("above", 8, 9, 5, 1), ("below", 1, 2.5, 0.5, 1.5), ("above", 2, 2, -1, 0.04)],
)
def test_room_is_the_width_of_the_range_or_a_share_of_the_number(
    side, lowest, highest, distance, room
):
    row = spread.Row("", "", side, 3, lowest, highest, 6)
    assert (row.distance(), row.room()) == (distance, room)
