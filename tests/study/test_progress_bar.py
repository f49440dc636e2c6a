"""Progress is one widget in a notebook, and nothing where its outputs are stored or compared."""

import nbformat
import pytest
from nbclient import NotebookClient

from study.paths import QUIET
from study.sliders import VIEW

SOURCE = """
import time
from study.progress import bar
for _ in bar(range(3), desc="recipes"):
    time.sleep(0.2)  # longer than tqdm waits between two lines
"""


def outputs():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SOURCE)])
    NotebookClient(notebook, kernel_name="python3").execute()
    return notebook.cells[0].outputs


def test_in_a_notebook_it_is_one_widget_and_no_line_on_stderr(monkeypatch):
    monkeypatch.delenv(QUIET, raising=False)
    (output,) = outputs()
    assert output.output_type == "display_data" and VIEW in output.data


@pytest.mark.parametrize("value", ["1", ""])
def test_where_nobody_watches_there_is_none(value, monkeypatch):
    monkeypatch.setenv(QUIET, value)
    assert outputs() == []
