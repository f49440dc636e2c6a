import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import nbformat
import pytest
from joblib import Parallel

from lib import notebooks, runs
from lib.bases import SCHEDULES, Schedule
from lib.codec.container import payload
from lib.quantize import Codes
from lib.recipes import RECIPES


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("RESULTS_ROOT", str(tmp_path / "results"))
    monkeypatch.setenv("FIGURES_ROOT", str(tmp_path / "figures"))
    monkeypatch.setattr(runs, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(SCHEDULES, ("digits", "resnet8"), Schedule(1, 0.05, 64))
    profile = replace(runs.PROFILES["quick"], networks={"digits": {"resnet8": (0,)}}, per_class=2)
    monkeypatch.setitem(runs.PROFILES, "quick", profile)
    monkeypatch.setattr(runs, "_removed", runs._removed.func)  # nothing from earlier tests
    # worker processes would not see what is patched here
    monkeypatch.setattr(runs, "Parallel", lambda **_: lambda jobs: [f(*a, **k) for f, a, k in jobs])
    return runs.Study("quick")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("quik",), "unknown profile 'quik'; known: quick, paper"),
        (("quick", "digit"), "unknown data set 'digit'; known: digits"),
        (("paper", "mnist/lenet"), "unknown network 'lenet' of mnist; known: lenet300, lenet5"),
    ],
)
def test_unknown_names_list_the_known(arguments, message):
    with pytest.raises(ValueError, match=message):
        runs.Study(*arguments)


def test_datasets_replace_those_of_the_profile():
    cases = runs.Study("paper", "mnist", seed=5).cases
    assert {case.model for case in cases} == {"lenet300", "lenet5"}
    assert sorted({case.seed for case in cases}) == [5, 6, 7]
    assert {case.model for case in runs.Study("paper", "cifar10").cases} == {"resnet20", "vgg16"}
    cases = runs.Study("paper", "mnist/lenet5,cifar10-jpeg/resnet20").cases
    assert [case.model for case in cases] == ["lenet5"] * 3 + ["resnet20"] * 3


def test_a_run_is_written_once_with_its_provenance_and_read_afterwards(study, monkeypatch):
    recipes, knobs = {"even": RECIPES["uniform"]}, {"uniform": (4, 8)}
    first = study.sweep(recipes, knobs)
    assert first["knob"].tolist() == [4, 8] and first["file_bytes"].is_monotonic_increasing
    records = sorted(study.runs.rglob("*.json"))
    assert len(records) == 2
    kept = json.loads(records[0].read_text())["provenance"]
    for key in ("commit", "packages", "device", "threads", "seconds", "code", "recipe"):
        assert key in kept
    monkeypatch.setattr(runs, "prepare", None)
    assert study.sweep(recipes, knobs).equals(first)


def test_equal_recipes_of_two_names_are_one_run(study):
    same = replace(RECIPES["uniform"], rounds=2, lam=5.0)
    table = study.sweep({"even": RECIPES["uniform"], "again": same})
    assert table["recipe"].tolist() == ["even", "again"]
    assert table["file_bytes"].nunique() == 1 and len(list(study.runs.rglob("*.json"))) == 1


def test_a_network_that_was_trained_anew_is_run_anew(study):
    recipes = {"even": RECIPES["uniform"]}
    first = study.sweep(recipes)
    (checkpoint,) = study.checkpoints.glob("*.safetensors")
    checkpoint.unlink()
    SCHEDULES["digits", "resnet8"] = Schedule(1, 0.02, 64)
    again = runs.Study("quick").sweep(recipes)
    assert len(list(study.runs.rglob("*.json"))) == 2
    assert again["base_val_accuracy"].item() != first["base_val_accuracy"].item()


def test_a_network_may_have_knobs_of_its_own(study, monkeypatch):
    special = replace(study.profile, special={"resnet8": {"uniform": (5,)}})
    monkeypatch.setattr(study, "profile", special)
    assert study.sweep({"even": RECIPES["uniform"]}, {"uniform": (4, 8)})["knob"].tolist() == [5]


def test_a_network_may_have_an_optimiser_of_its_own(study, monkeypatch):
    monkeypatch.setattr(study, "profile", replace(study.profile, optimisers={"resnet8": "sgd"}))
    tuned = replace(RECIPES["lrp-paper"], finetune=2)
    recipes = {"own": tuned, "same": replace(tuned, optimiser="sgd"), "even": RECIPES["uniform"]}
    own, same, _ = study.sweep(recipes)["val_accuracy"]
    assert own == same and len(runs.read_records(study.runs)) == 2
    study.sweep({"given": tuned}, as_given=True)
    used = [row["provenance"]["recipe"] for row in runs.read_records(study.runs)]
    tuners = sorted(recipe["optimiser"] for recipe in used if recipe["finetune"])
    assert tuners == ["adam", "sgd"]


def test_bits_are_those_of_the_files_of_the_runs(study, monkeypatch):
    recipe = RECIPES["uniform"]
    anew = runs.bits_per_layer(study, {"even": (recipe, 3)})
    study.sweep({"even": recipe}, {"uniform": (3,)})
    (file,) = (runs.CACHE / "quick" / "files").rglob("*.xaic")
    stored = {
        name: 8 * len(payload(entry)) / entry.symbols.numel()
        for name, entry in runs.Compressed.load(file).items()
        if isinstance(entry, Codes)
    }
    monkeypatch.setattr(runs, "prepare", None)
    kept = runs.bits_per_layer(study, {"even": (recipe, 3)})
    assert kept.equals(anew)
    assert dict(zip(kept["layer"], kept["bits"], strict=True)) == pytest.approx(stored)


def test_only_what_is_missing_is_run_after_an_interruption(study, monkeypatch):
    recipes = {"even": RECIPES["uniform"], "again": replace(RECIPES["magnitude"], density=0.6)}
    done, original = [], runs.prepare

    def interrupted(*args, **keywords):
        done.append(args)
        if len(done) == 2:
            raise KeyboardInterrupt
        return original(*args, **keywords)

    monkeypatch.setattr(runs, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.sweep(recipes)
    assert len(study.sweep(recipes)) == 2
    assert len(done) == 3
    assert not [path for path in study.runs.rglob(".*")]


def test_the_accuracy_is_that_of_the_file(study):
    row = study.sweep({"even": RECIPES["uniform"]}).iloc[0]
    (file,) = (runs.CACHE / "quick" / "files").rglob("*.xaic")
    loaded = runs.Compressed.load(file).to_model(study.base(study.cases[0]))
    assert file.stat().st_size == row["file_bytes"]
    assert runs.evaluate(loaded, *runs.split("digits", "test")) == row["test_accuracy"]


def test_the_cost_counts_what_runs_share_once(study):
    study.sweep({"even": RECIPES["uniform"]}, {"uniform": (4, 8)})
    study.sweep({"magnitude": RECIPES["magnitude"]})
    (row,) = runs.cost(study.runs).to_dict("records")
    records = [json.loads(path.read_text()) for path in study.runs.rglob("*.json")]
    seconds = {"none": [], "top": []}
    for record in records:
        where = record["provenance"]
        seconds[where["recipe"]["pruning"]].append(where["threads"] * where["seconds"])
    assert (row["model"], row["seeds"], row["runs"]) == ("resnet8", 1, 3)
    assert row["core hours"] == pytest.approx(sum(map(max, seconds.values())) / 3600)
    assert runs.cost(study.runs / "nothing").empty


def test_provenance_does_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    where = runs._environment.__wrapped__()
    assert where["commit"] == "unknown" and where["packages"]["torch"]


def test_prose_does_not_change_the_digest_of_the_code(tmp_path, monkeypatch):
    def digest(source):
        (tmp_path / "lib").mkdir(exist_ok=True)
        (tmp_path / "lib/one.py").write_text(source)
        runs.code_digest.cache_clear()
        return runs.code_digest()

    monkeypatch.setattr(runs, "ROOT", tmp_path)
    plain = digest("def f(x):\n    return x + 1\n")
    told = digest('"""A module."""\n\n\ndef f(x):\n    """Add."""\n    return x + 1  # one\n')
    assert plain == told != digest("def f(x):\n    return x + 2\n")
    runs.code_digest.cache_clear()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    runs.write_json(path, [1])
    with pytest.raises(TypeError):
        runs.write_json(path, [object()])
    assert json.loads(path.read_text()) == [1] and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def one_notebook(study, tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(notebooks, "FOLDER", folder)
    monkeypatch.setattr(notebooks, "CACHE", tmp_path / "cache")

    def write(source, parameters='profile = "quick"\ndatasets = ""'):
        cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        cells = [cell, nbformat.v4.new_code_cell(source)]
        content = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(content, folder / "00-one.ipynb")

    return write


def test_a_notebook_that_fails_names_its_cell(one_notebook):
    one_notebook("1 / 0")
    with pytest.raises(notebooks.NotebookError, match=r"00-one.ipynb, cell \[.*ZeroDivisionError"):
        notebooks.reproduce("quick")


def test_a_notebook_is_skipped_until_it_changes(one_notebook, study, capfd):
    mark = study.results / "table.csv"
    mark.parent.mkdir(parents=True)
    text = f"open({str(mark)!r}, 'w').close()"
    one_notebook(text)
    for _ in range(2):
        notebooks.reproduce("quick")
    assert capfd.readouterr().out.count("up to date") == 1
    mark.unlink()
    notebooks.reproduce("quick")
    assert mark.exists() and "up to date" not in capfd.readouterr().out
    one_notebook(text + "\n1")
    notebooks.reproduce("quick")
    assert "up to date" not in capfd.readouterr().out


def test_notebooks_run_side_by_side_and_the_last_one_after_them(
    one_notebook, study, tmp_path, monkeypatch
):
    # threads, because worker processes would not see what is patched here
    monkeypatch.setattr(notebooks, "Parallel", partial(Parallel, backend="threading"))
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", str(os.cpu_count()))
    one_notebook("import time; time.sleep(1)")
    last = "import pathlib; assert len(list(pathlib.Path('..').glob('seen-*'))) == 2"
    source = (tmp_path / "notebooks/00-one.ipynb").read_text()
    for stem in ("01-two", "02-last"):
        body = last if stem == "02-last" else "open('../seen-01', 'w').close()"
        (tmp_path / f"notebooks/{stem}.ipynb").write_text(
            source.replace("import time; time.sleep(1)", body)
        )
    (tmp_path / "notebooks/00-one.ipynb").write_text(
        source.replace("time.sleep(1)", "time.sleep(1); open('../seen-00', 'w').close()")
    )
    notebooks.reproduce("quick")
    assert len(list(tmp_path.glob("seen-*"))) == 2


def test_a_notebook_without_the_parameters_is_refused(one_notebook):
    one_notebook("1", parameters='profil = "quick"\ndatasets = ""')
    with pytest.raises(notebooks.NotebookError, match="has no parameter profile"):
        notebooks.reproduce("quick")


def test_command_line_says_what_is_known_and_fails():
    command = [sys.executable, "-m", "lib", "reproduce", "--profile", "fast"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "unknown profile 'fast'; known: quick, paper" in done.stderr
