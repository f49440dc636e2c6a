"""The variants of ``make test-machines`` are tried on all tests that hold trained numbers."""

import ast
from contextlib import nullcontext
from pathlib import Path

import machines
import pytest
import spread

TESTS = Path(machines.__file__).parent
TRAINED = {"trained", "trained_once", "study"}  # fixtures that train a network


def holds_trained_numbers(path):
    """Whether tests of a file ask for a trained network, or train one."""
    for node in ast.walk(ast.parse(path.read_text())):
        asked = node.args.args if isinstance(node, ast.FunctionDef) else []
        if TRAINED & {argument.arg for argument in asked} and node.name.startswith("test_"):
            return True
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("fit", "finetune"):
            return True
    return False


def test_tests_of_trained_numbers_run_on_every_processor():
    files = {p.relative_to(TESTS).as_posix(): p for p in TESTS.rglob("test_*.py")}
    found = {name for name, path in files.items() if holds_trained_numbers(path)}
    assert len(found) > 10 and found - set(machines.NUMBERS) == set()
    assert {*machines.NUMBERS, *machines.PLACES} <= set(files)


@pytest.mark.parametrize(
    "verdicts, expected",
    [
        (["passed"] * 3, ("passed", "3 times said")),
        (["passed", "FAILED"], ("FAILED", "run 2 of 3: said")),
        (["not run"], ("not run", "said")),
    ],
)
def test_a_variant_has_to_pass_each_time(verdicts, expected, monkeypatch):
    left = list(verdicts)
    monkeypatch.setattr(machines, "outcome", lambda _: (left.pop(0), "said"))
    assert machines.repeated(machines.Variant("a"), 3) == expected and not left


@pytest.mark.parametrize(
    "best, runs",
    [("AVX512", [True] * 3), ("AVX2", [True, True, False]), ("DEFAULT", [True, False, False])],
)
def test_instructions_that_the_processor_does_not_have_are_not_run(best, runs, monkeypatch):
    monkeypatch.setattr(machines.cpu, "get_cpu_capability", lambda: best)
    for needed, can in zip(("", "AVX2", "AVX512"), runs, strict=True):
        with nullcontext() if can else pytest.raises(machines.NotRunError, match=f"no {needed}"):
            machines.has(needed)(None, None)


def test_measuring_runs_what_measures_on_each_processor(monkeypatch):
    asked, wrote = [], []
    monkeypatch.setattr(machines, "run", lambda variants: asked.extend(variants) or 0)
    monkeypatch.setattr(spread, "write", lambda logs, keep: wrote.append(keep))
    for given in (("test_prune.py",), ()):
        assert machines.measure(given) == 0
    assert wrote == [True, False] and len(asked) == 12
    assert {test.partition("::")[0] for test in asked[0].tests} == {"test_prune.py"}
    assert set(asked[6].tests) == {test for test, _ in spread.calls()}
    assert len({variant.environment["SPREAD_LOG"] for variant in asked}) == 12
