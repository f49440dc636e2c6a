"""What notebooks ask for and conclude, on the runs that are committed: nothing is run anew.

Each notebook's statements are executed with a study whose sweeps find their rows in the committed
tables of the quick profile; statements that need a base network are left out. So a recipe that is
dropped, a threshold that is moved, a choice that is made on other columns, or a figure of other
columns than it says shows, without a network being trained.
"""

import ast
import json
import re

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from study import Study, figures
from study.paths import ROOT
from study.records import read_claims

COMMITTED = ROOT / "results" / "quick"
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]-*.ipynb"))
RUN = ["dataset", "model", "seed", "recipe", "per_class"]
MEASURED = ["knob", "density", "file_bytes", "ratio", "bits", "val_accuracy", "test_accuracy",
            "base_val_accuracy", "base_test_accuracy"]  # fmt: skip
FROM_RUNS = {"C1", "C2", "C3", "C4", "C4s", "C5", "C6", "C7", "L1", "A1"}


def committed(name):
    return pd.read_csv(COMMITTED / f"{name}.csv")


def tables_of_runs():
    tables = {path.stem: pd.read_csv(path) for path in sorted(COMMITTED.glob("*.csv"))}
    return {name: table for name, table in tables.items() if {*RUN, *MEASURED} <= set(table)}


class NotReplayedError(Exception):
    """Of a statement that needs a network."""


def refuse(*_, **__):
    raise NotReplayedError


class Replay(Study):
    """A study that looks its runs up, and notes what it is asked for and given."""

    last: "Replay"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        tables = [t[RUN + MEASURED] for n, t in tables_of_runs().items() if "smallest" not in n]
        self.known = [dict(list(table.groupby(RUN, sort=False))) for table in tables]
        self.recipes, self.images = {}, []
        self.tables, self.claims, self.drawn, self.models = {}, {}, [], []
        Replay.last = self

    base = references = compressed = refuse

    def sweep(self, recipes, knobs=None, cases=None, per_class=None, as_given=False):
        self.recipes |= recipes
        self.images.append(per_class)
        images = per_class or self.per_class
        asked = {
            (case.dataset, case.model, case.seed, name, images): (case, recipe)
            for case in cases or self.cases
            for name, recipe in recipes.items()
        }
        # a name may mean one recipe in one table and another in the next
        table = next((known for known in self.known if asked.keys() <= known.keys()), None)
        assert table, f"no committed table has {list(asked)}"
        found = []
        for key, (case, recipe) in asked.items():
            rows = table[key]
            if len(rows) > 1:  # else the notebook may have put something else in its place
                variants = self._variants(case, recipe, knobs or {}, images)
                values = [variant.store.value for variant in variants]
                rows = rows.set_index("knob", drop=False).loc[values]
            found.append(rows)
        return pd.concat(found, ignore_index=True)

    def save_table(self, name, table):
        self.tables[name] = table

    def save_claims(self, notebook, claims):
        self.claims[notebook] = [claim.row(notebook) for claim in claims]

    def save_figure(self, name, figure):
        self.drawn.append(name)

    def save_models(self, best, recipes, *folder):
        self.models += recipes


def replayed(name, context):
    """The study of a notebook that was executed, calls of figures, and what went wrong."""
    calls, wrong = [], []

    def noted(kind):
        return lambda table, *arguments, **named: calls.append((kind, table, arguments, named))

    for kind in ("curves", "ladder", "matrix"):
        context.setattr(figures, kind, noted(kind))
    known = {}
    for statement in ast.parse("\n".join(code(name))).body:
        try:
            exec(compile(ast.Module([statement], []), name, "exec"), known)
        except Exception as error:  # told where a table that has to be there is not
            wrong.append(f"{ast.unparse(statement)[:100]}: {error!r}")
    plt.close("all")
    return Replay.last, calls, wrong


def code(name):
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def replays(tmp_path_factory):
    """By notebook, what ``replayed`` gives."""
    with pytest.MonkeyPatch.context() as context:
        context.setenv("RESULTS_ROOT", str(ROOT / "results"))
        for module in ("paths", "data"):
            context.setattr(f"study.{module}.CACHE", tmp_path_factory.mktemp("cache"))
        context.setattr("study.Study", Replay, raising=False)
        context.setattr("study.sweep.Study", Replay)
        context.setattr(torch.Tensor, "backward", refuse)
        context.setattr(plt, "show", lambda: None)
        used = [name for name in NAMES if re.search(r"\.(sweep|load_table)\(", "".join(code(name)))]
        return {name: replayed(name, context) for name in used}


def test_notebooks_come_to_all_committed_tables_of_runs(replays):
    found = {
        title: table for study, *_ in replays.values() for title, table in study.tables.items()
    }
    for title, expected in tables_of_runs().items():
        assert title in found, (title, [wrong for *_, wrong in replays.values()])
        table = found[title][list(expected)].reset_index(drop=True)
        table = table.astype({c: expected[c].dtype for c in expected})
        pd.testing.assert_frame_equal(table, expected, obj=title)


def test_notebooks_come_to_all_committed_claims_about_runs(replays):
    rows = [row for row in read_claims(COMMITTED) if row["id"] in FROM_RUNS]
    found = [row for study, *_ in replays.values() for n in study.claims for row in study.claims[n]]
    assert [row for row in found if row["id"] in FROM_RUNS] == rows
    assert {row["id"] for row in rows} >= {"C1", "C2", "C3", "C4", "C4s", "C5", "C6", "A1"}


def test_figures_show_the_columns_that_they_say(replays):
    shown = [call for _, calls, _ in replays.values() for call in calls]
    assert len(shown) >= 15
    for kind, table, columns, named in shown:
        if kind == "curves":
            x, y, *hue = columns
            assert {x, y, *hue, "dataset", "model", "seed", "knob"} <= set(table)
            assert named.get("base", f"base_{y}") == f"base_{y}"
            assert "val" not in y  # what choices are made on is not what is shown
            meant = {"file (bytes, logarithmic)": "file_bytes", "share of weights kept": "density"}
            assert x == meant.get(named.get("xlabel", ""), x)
            assert "test" in y or "test" not in named.get("ylabel", "")
        if kind == "ladder":
            assert not columns and not named and "base_test_accuracy" in table


def test_figures_that_are_kept_are_drawn_once(replays):
    drawn = [name for study, *_ in replays.values() for name in study.drawn]
    held = {path.stem for path in (ROOT / "figures" / "quick").glob("*.png")}
    assert drawn and set(drawn) <= held and len(set(drawn)) == len(drawn)


def test_both_sides_of_a_comparison_get_the_same_images_and_steps(replays):
    (study,) = [study for study, *_ in replays.values() if "headline" in study.tables]
    assert set(study.images) == {None}  # the profile's
    tuned = {n: r.repair.finetune for n, r in study.recipes.items() if r.repair.finetune}
    assert set(tuned.values()) == {study.profile.finetune}
    assert any(name.startswith("deeplift") for name in tuned) and "lrp, pruned, fine-tuned" in tuned
    assert {n for n, r in study.recipes.items() if "fine-tuned" in n} <= set(tuned)
    assert {"deeplift 100%", "deeplift 80%", "lrp", "lrp root"} <= set(study.models)


def test_all_quantizers_that_train_leave_it_to_the_profile_how(replays):
    (study,) = [study for study, *_ in replays.values() if "trained" in study.tables]
    stores = {n: r.store for n, r in study.recipes.items() if r.store.trains}
    assert {"ECQx", "lrp root, trained", "alike, trained"} <= set(stores)
    settings = {name for own in study.profile.trained.values() for name in own}
    for store in stores.values():  # the profile's hold where a recipe has the defaults
        own = [n for n in settings if getattr(store, n, None) != getattr(type(store), n, None)]
        assert "steps" in settings and not own
