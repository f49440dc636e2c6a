"""What is up to date, and what the commands write; the commands as make runs them are elsewhere."""

import json

import pytest

from study import __main__, digests, paths, publish, stamps
from study.records import write_json

PARAMETERS = {"profile": "quick", "seed": 0}
CLAIM = {"id": "B1", "claim": "s", "where": "a-x", "expected": "1", "ours": "0.5",
         "verdict": "fails", "seeds": [0], "holds": False, "notebook": "01-train"}  # fmt: skip


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """A notebook that wrote one table; write it anew with other code, or another name."""
    monkeypatch.setenv("RESULTS_ROOT", str(tmp_path / "results"))
    monkeypatch.setenv("STUDY_LEDGER", str(tmp_path / "ledger"))
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(stamps, "FOLDER", tmp_path)
    (tmp_path / "lib.py").write_text("x = 1\n")
    monkeypatch.setattr(digests, "sources", lambda: [tmp_path / "lib.py"])
    (tmp_path / "results" / "quick").mkdir(parents=True)

    def make(code="1 + 1", name="one"):
        told = {"cell_type": "code", "metadata": {"tags": ["parameters"]}}
        cells = [told | {"source": ['profile = ""\n', "seed = 0"]},
                 {"cell_type": "code", "metadata": {}, "source": [code]},
                 {"cell_type": "markdown", "metadata": {}, "source": ["prose"]}]  # fmt: skip
        (tmp_path / f"{name}.ipynb").write_text(json.dumps({"cells": cells}))
        (tmp_path / "table.csv").write_text("a\n1\n")
        (tmp_path / "ledger").write_text(f"{tmp_path / 'table.csv'}\n")
        return name

    return make


def test_a_notebook_is_stale_once_anything_that_it_depends_on_has_changed(
    notebook, tmp_path, monkeypatch
):
    def fresh(parameters=PARAMETERS):
        return stamps.fresh("quick", "one", parameters)

    def ran():
        notebook()
        stamps.stamp("quick", "one", PARAMETERS)
        assert fresh()

    notebook()
    assert not fresh()
    ran()
    assert not (tmp_path / "ledger").exists()
    assert not fresh(PARAMETERS | {"seed": 1})
    (tmp_path / "lib.py").write_text("x = 2\n")
    assert not fresh()
    ran()
    (tmp_path / "table.csv").write_text("a\n2\n")
    assert not fresh()
    ran()
    (tmp_path / "table.csv").unlink()
    assert not fresh()
    ran()
    notebook("1 + 2")
    assert not fresh()
    ran()
    monkeypatch.setenv("DATA_ROOT", "elsewhere")
    assert not fresh()


@pytest.mark.parametrize("content", ["", "{", "[]", "1", '{"asked": 1}', '{"written": []}'])
def test_a_stamp_of_another_version_is_none(notebook, tmp_path, content):
    notebook()
    stamps.stamp("quick", "one", PARAMETERS)
    (path,) = (tmp_path / "cache").rglob("one.json")
    path.write_text(content)
    assert not stamps.fresh("quick", "one", PARAMETERS)


@pytest.mark.parametrize(
    "name, files",
    [(stamps.LAST, ("table.csv", "claims-01.json")), ("06-beyond", (f"{paths.STANDARD}.csv",))],
)
def test_a_notebook_depends_on_the_results_that_it_reads(notebook, tmp_path, name, files):
    name = notebook(name=name)
    results = tmp_path / "results" / "quick"
    for file in files:
        stamps.stamp("quick", name, PARAMETERS)
        assert stamps.fresh("quick", name, PARAMETERS)
        (results / file).write_text("changed")
        assert not stamps.fresh("quick", name, PARAMETERS)


def test_the_command_for_claims_writes_their_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RESULTS_ROOT", str(tmp_path / "results"))
    monkeypatch.setattr("study.data.CACHE", tmp_path / "cache")
    results = tmp_path / "results" / "quick"
    for ours in ("0.5", "0.7"):
        write_json(results / "claims-01-train.json", [CLAIM | {"ours": ours}])
        assert __main__.main(["claims", "--profile", "quick"]) == 0
        assert "profile 'quick': 0 of 1 claims hold" in capsys.readouterr().out
        text = (results / "CLAIMS.md").read_text()
        assert f"**{ours}**" in text and text == publish.claims_text(results)
