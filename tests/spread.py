"""Bounds for numbers out of training, and how far such numbers spread between processors.

The same training ends elsewhere on another processor. So a test hands such a number, the bound that
says what it wants to know, and a name to ``assert_above`` or ``assert_below``; of two trained
numbers, their difference or ratio. ``make spread`` runs these tests on every kind of processor that
the machine can be and writes the range of each number to ``spread.csv``. ``test_spread.py`` holds
every bound ``room`` away from its range: where it is nearer, the test has to ask something else.
"""

import ast
import csv
import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
TABLE = TESTS / "spread.csv"
ASSERTIONS = ("assert_above", "assert_below")
LEAST_RUNS = 5  # kinds of processor without which a range says too little


class Row(NamedTuple):
    """Range of one number; ``test`` is its file and function, ``side`` where of ``bound`` it is."""

    test: str
    what: str
    side: str
    bound: float
    lowest: float
    highest: float
    runs: int

    def distance(self) -> float:
        """From the bound to the nearest number that was measured; negative beyond the bound."""
        return self.lowest - self.bound if self.side == "above" else self.bound - self.highest

    def room(self) -> float:
        """The least distance.

        The width of the range, since six numbers of a normal distribution span 2.5 deviations on
        average: another processor's lies that far beyond once in 14,000 times. And a fiftieth of
        the number, since few may be equal by chance.
        """
        return max(self.highest - self.lowest, 0.02 * max(abs(self.lowest), abs(self.highest)))


def assert_above(value: float, bound: float, what: str) -> None:
    """Fail unless a number out of training lies above what the test asks of it."""
    __tracebackhide__ = True
    _hold(float(value), "above", float(bound), what)


def assert_below(value: float, bound: float, what: str) -> None:
    """Fail unless a number out of training lies below what the test allows it."""
    __tracebackhide__ = True
    _hold(float(value), "below", float(bound), what)


def _hold(value: float, side: str, bound: float, what: str) -> None:
    __tracebackhide__ = True
    test = re.search(r"(study/)?\w+\.py::\w+", os.environ["PYTEST_CURRENT_TEST"]).group()
    if log := os.environ.get("SPREAD_LOG"):
        with open(log, "a", newline="") as file:
            csv.writer(file).writerow([test, what, side, bound, value])
    else:
        row = table().get((test, what))
        if row is None or (row.side, row.bound) != (side, bound):
            raise AssertionError(
                f"how far {what!r} spreads was not measured for {side} {bound:g}: `make spread`"
            )
    if not (value > bound if side == "above" else value < bound):
        raise AssertionError(f"{what}: {value:g} is not {side} {bound:g}")


@cache
def table(path: Path = TABLE) -> dict[tuple[str, str], Row]:
    """Rows by test and name."""
    with open(path, newline="") as file:
        rows = [Row(*r[:3], *map(float, r[3:6]), int(r[6])) for r in list(csv.reader(file))[1:]]
    return {(row.test, row.what): row for row in rows}


def write(logs: Iterable[Path], path: Path = TABLE, keep: bool = False) -> None:
    """Make the table from what each variant has logged; ``keep`` rows of tests that did not run."""
    seen: dict[tuple, dict[Path, list[float]]] = {}
    for log in logs:
        with open(log, newline="") as file:
            for *number, value in csv.reader(file):
                seen.setdefault(tuple(number), {}).setdefault(log, []).append(float(value))
    rows = [
        Row(test, what, side, float(bound), min(values), max(values), len(runs))
        for (test, what, side, bound), runs in seen.items()
        for values in [sum(runs.values(), [])]
    ]
    tests = {row.test for row in rows}
    rows += [row for row in table(path).values() if keep and row.test not in tests]
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [Row._fields, *([*r[:3], *(f"{v:.6g}" for v in r[3:6]), r.runs] for r in sorted(rows))]
        )
    table.cache_clear()


def calls(folder: Path = TESTS) -> Iterator[tuple[str, re.Pattern]]:
    """Test, and pattern of the name, of every number that the tests measure."""
    for path in sorted(folder.rglob("test_*.py")):
        for function in ast.parse(path.read_text()).body:
            for node in ast.walk(function):
                if getattr(getattr(node, "func", None), "id", "") not in ASSERTIONS:
                    continue
                parts = getattr(node.args[2], "values", [node.args[2]])
                name = [re.escape(p.value) if isinstance(p, ast.Constant) else ".+" for p in parts]
                test = f"{path.relative_to(folder).as_posix()}::{getattr(function, 'name', '')}"
                yield test, re.compile("".join(name))
