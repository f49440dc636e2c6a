"""Each notebook is one that nbval compares, and that was run from top to bottom."""

import ast
import inspect
import json
import re

import pytest

from study import Study
from study.paths import ROOT

PATHS = sorted((ROOT / "notebooks").glob("[0-9][0-9]-*.ipynb"))
PARAMETERS = set(inspect.signature(Study).parameters)
LEFT_OUT = re.compile(r"nbval[-_](skip|ignore[-_]output)|raises[-_]exception|nbval[-_]raises", re.I)


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def notebook(request):
    return json.loads(request.param.read_text())


def source(cell):
    return "".join(cell["source"])


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def tags(cell):
    return cell["metadata"].get("tags", [])


def test_there_are_notebooks():
    assert len(PATHS) >= 10


def test_it_was_run_once_from_top_to_bottom(notebook):
    # a cell without a count is never compared
    counts = [cell["execution_count"] for cell in code(notebook)]
    assert counts == sorted(set(counts)) and counts[0] >= 1
    assert all(source(cell).strip() for cell in code(notebook))
    for cell in code(notebook):
        for output in cell["outputs"]:
            assert output.get("execution_count", cell["execution_count"]) in counts


def test_no_error_and_no_warning_is_stored(notebook):
    outputs = [output for cell in code(notebook) for output in cell["outputs"]]
    assert outputs
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data",
                                                             "execute_result"}  # fmt: skip
    said = ["".join(o["text"]) for o in outputs if o["output_type"] == "stream"]
    assert not [text for text in said if re.search(r"Traceback|Warning", text)]


def test_one_cell_of_parameters_each_with_its_meaning(notebook):
    (cell,) = [cell for cell in code(notebook) if "parameters" in tags(cell)]
    assert cell is code(notebook)[0]
    lines = source(cell).splitlines()
    assert {ast.parse(line).body[0].targets[0].id for line in lines} == PARAMETERS
    assert all("  # " in line for line in lines)
    assert not [cell for cell in code(notebook) if "injected-parameters" in tags(cell)]


def test_parameters_are_those_of_the_stored_outputs(notebook):
    values = {}
    exec(source(code(notebook)[0]), values)
    defaults = {n: p.default for n, p in inspect.signature(Study).parameters.items()}
    assert {name: values[name] for name in PARAMETERS} == defaults


def test_a_cell_that_is_not_compared_says_why(notebook):
    for cell in code(notebook):
        marked = [tag for tag in tags(cell) if LEFT_OUT.fullmatch(tag)]
        commented = [line for line in source(cell).splitlines() if LEFT_OUT.search(line)]
        assert not marked, f"say why in a comment instead: # NBVAL_SKIP: ... ({marked})"
        assert all(re.search(r"# NBVAL_\w+: \S+ \S+", line) for line in commented), commented
        assert not any("RAISES" in line.upper() for line in commented), commented


def test_what_is_stored_names_no_place_and_no_moment(notebook):
    """Text is compared strictly; addresses, folders and dates would differ on each machine."""
    stored = json.dumps([cell["outputs"] for cell in code(notebook)])
    assert not re.search(
        r" at 0x[0-9a-f]{6,}|/(root|home|tmp|Users)/\w|\b20\d\d-\d\d-\d\dT", stored
    )
    kept = {"tags", "jupyter", "slideshow", "nbsphinx"}
    assert all(set(cell["metadata"]) <= kept for cell in notebook["cells"])


def test_text_that_is_compared_strictly_holds_no_long_number(notebook):
    """A float printed in full differs in its last digits on another processor."""
    for cell in code(notebook):
        for output in cell["outputs"]:
            data = output.get("data", {})
            text = "".join(data.get("text/plain", output.get("text", [])))
            if output.get("name") != "stderr":
                assert not re.search(r"\d\.\d{5,}|\d[eE][-+]\d\d", text), text
