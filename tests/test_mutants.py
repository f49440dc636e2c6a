"""The lists of planted faults are alive; ``make mutants`` plants them."""

import ast
import re

import pytest
from mutants import run

FAULTS = run.faults()


def test_names_differ_and_there_are_enough():
    names = [fault["name"] for fault in FAULTS]
    assert len(set(names)) == len(names) >= 90
    assert all(fault["believes"].strip() and fault["tests"] for fault in FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault["name"])
def test_a_fault_can_be_planted_and_the_tests_named_for_it_exist(fault):
    text = run.source(fault["file"]).read_text()
    changed = run.planted(fault, text)
    assert changed != text
    if fault["file"].endswith(".py"):
        ast.parse(changed)
    for test in fault["tests"]:
        path, _, function = test.partition("::")
        function = function.partition("[")[0]
        assert re.search(rf"^def {function}\(", run.source(path).read_text(), re.M), test


def test_a_fault_whose_text_is_gone_is_an_error_of_the_list():
    fault = {"name": "gone", "file": "lib/files.py", "old": "not there", "new": "x"}
    with pytest.raises(ValueError, match="gone: its text stands 0 times in lib/files.py"):
        run.planted(fault, "text")
