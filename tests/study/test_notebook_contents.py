"""What notebooks ask for and conclude, on the runs that are committed: nothing is run anew.

Each notebook's cells are executed with a study whose sweeps find their rows in the committed tables
of the quick profile. So a recipe that is dropped, a threshold that is moved, a choice that is made
on other columns, or a figure of other columns than it says shows, without a network being trained.
"""

import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest

import lib.relevance
from study import Study, figures, pictures, probes
from study.paths import ROOT
from study.records import read_claims

COMMITTED = ROOT / "results" / "quick"
NOTEBOOKS = ["03-pruning", "04-mixed-precision", "05-xai-baseline", "07-ablations", "09-paper"]
RUN = ["dataset", "model", "seed", "recipe"]


def committed(name):
    return pd.read_csv(COMMITTED / f"{name}.csv")


def known_runs():
    paths = [p for p in sorted(COMMITTED.glob("*.csv")) if not p.stem.endswith("-smallest")]
    tables = [pd.read_csv(path) for path in paths]
    runs = [table for table in tables if {"recipe", "file_bytes", "knob"} <= set(table)]
    return pd.concat(runs).drop_duplicates([*RUN, "per_class", "knob"])


class Replay(Study):
    """A study that looks its runs up, and notes what it is asked for and given."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.known, self.recipes, self.images = known_runs(), {}, []
        self.tables, self.claims, self.drawn, self.models = {}, {}, [], []
        Replay.last = self

    def sweep(self, recipes, knobs=None, cases=None, per_class=None, as_given=False):
        self.recipes |= recipes
        self.images.append(per_class)
        assert knobs in (None, self.profile.knobs)
        found = []
        for case in cases or self.cases:
            for name in recipes:
                where = dict(zip(RUN, (case.dataset, case.model, case.seed, name), strict=True))
                where["per_class"] = per_class or self.per_class
                rows = self.known
                for column, value in where.items():
                    rows = rows[rows[column] == value]
                assert len(rows), f"{name} of {case} is in no committed table"
                found.append(rows)
        return pd.concat(found, ignore_index=True)

    def bits_per_layer(self, recipes):
        return committed("bits-per-layer")

    def base(self, case, progress=True):
        return None

    def references(self, case, per_class=None):
        return None, None

    def save_table(self, name, table):
        self.tables[name] = table

    def save_claims(self, notebook, claims):
        self.claims[notebook] = [claim.row(notebook) for claim in claims]

    def save_figure(self, name, figure):
        self.drawn.append(name)

    def save_models(self, best, recipes):
        self.models += recipes


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Execute a notebook; gives its study and the calls of figures, name and arguments each."""
    calls = []

    def noted(name):
        def draw(table, *arguments, **named):
            calls.append((name, table, arguments, named))

        return draw

    monkeypatch.setenv("RESULTS_ROOT", str(ROOT / "results"))
    monkeypatch.setattr("study.paths.CACHE", tmp_path)
    monkeypatch.setattr("study.data.CACHE", tmp_path)
    monkeypatch.setattr("study.Study", Replay, raising=False)
    monkeypatch.setattr(plt, "show", lambda: None)
    for name in ("curves", "bars", "ladder", "matrix"):
        monkeypatch.setattr(figures, name, noted(name))
    monkeypatch.setattr(pictures, "histograms", lambda *_: None)
    monkeypatch.setattr(lib.relevance, "weight_relevance", lambda *_: {})
    monkeypatch.setattr(probes, "sign_agreement", lambda *_: committed("signs"))
    monkeypatch.setattr(probes, "harm_foretold", lambda *_: committed("harm-foretold"))

    def execute(name):
        cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        exec(compile("\n".join(code), name, "exec"), {})
        return Replay.last, calls

    return execute


@pytest.mark.parametrize("name", NOTEBOOKS[:-1])
def test_a_notebook_comes_to_the_committed_tables_and_claims(name, run):
    study, _ = run(name)
    assert len(study.tables) >= 2
    for title, table in study.tables.items():
        expected = committed(title)
        table = table[list(expected)].reset_index(drop=True)
        table = table.astype({c: expected[c].dtype for c in expected})
        pd.testing.assert_frame_equal(table, expected, obj=title)
    rows = [row for row in read_claims(COMMITTED) if row["notebook"] == name]
    assert study.claims[name] == rows


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_figures_show_the_columns_that_they_say(name, run):
    study, calls = run(name)
    assert calls
    for kind, table, columns, named in calls:
        if kind == "curves":
            x, y, *hue = columns
            assert {x, y, *hue, "dataset", "model", "seed", "knob"} <= set(table)
            assert named["base"] == f"base_{y}" == "base_test_accuracy"
            meant = {"file (bytes)": "file_bytes", "share of weights kept": "density"}
            assert x == meant.get(named.get("xlabel", ""), x)
        if kind == "ladder":
            assert not columns and named == {"xlabel": "test accuracy (%)"}
    held = sorted(path.stem for path in (ROOT / "figures" / "quick").glob("*.png"))
    assert set(study.drawn) <= set(held) and len(set(study.drawn)) == len(study.drawn)


def test_both_sides_of_a_comparison_get_the_same_images_and_steps(run):
    study, _ = run("05-xai-baseline")
    assert set(study.images) == {None}  # the profile's
    tuned = {n: r.repair.finetune for n, r in study.recipes.items() if r.repair.finetune}
    assert set(tuned.values()) == {study.profile.finetune}
    assert any(name.startswith("deeplift") for name in tuned) and "lrp, pruned, fine-tuned" in tuned
    assert {n for n, r in study.recipes.items() if "fine-tuned" in n} <= set(tuned)
    assert {"deeplift 100%", "deeplift 80%", "lrp", "lrp root"} <= set(study.models)
