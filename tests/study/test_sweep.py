import json
import os
import signal
from dataclasses import replace

import pandas as pd
import pytest
from spread import assert_above

from lib import RECIPES, Compressed, Recipe, Repair
from lib.codec.container import payload
from lib.finetune import evaluate
from lib.prune import KeepTop
from lib.quantize import Codes, ECQx, RateDistortion, Trained, Uniform
from study import Study, data, digests, jobs, records, sweep
from study.bases import SCHEDULES, Schedule
from study.data import DATASETS, Dataset, split
from study.tables import smallest_files


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
        Study(*arguments)


def test_datasets_replace_those_of_the_profile():
    cases = Study("paper", "mnist", seed=5).cases
    assert {case.model for case in cases} == {"lenet300", "lenet5"}
    assert sorted({case.seed for case in cases}) == [5, 6, 7]
    assert {case.model for case in Study("paper", "cifar10").cases} == {"resnet20", "vgg16"}
    cases = Study("paper", "mnist/lenet5,cifar10-jpeg/resnet20").cases
    assert [case.model for case in cases] == ["lenet5"] * 3 + ["resnet20"] * 3


def test_a_run_is_written_once_with_its_provenance_and_read_afterwards(study, monkeypatch):
    recipes, knobs = {"even": RECIPES["uniform"]}, {"uniform": (4, 8)}
    first = study.sweep(recipes, knobs)
    assert first["knob"].tolist() == [4, 8] and first["file_bytes"].is_monotonic_increasing
    paths = sorted(study.runs.rglob("*.json"))
    assert len(paths) == 2
    kept = json.loads(paths[0].read_text())["provenance"]
    for key in ("commit", "packages", "device", "threads", "seconds", "code", "recipe"):
        assert key in kept
    monkeypatch.setattr(jobs, "prepare", None)
    assert study.sweep(recipes, knobs).equals(first)


def test_equal_recipes_of_two_names_are_one_run(study):
    same = replace(RECIPES["uniform"], repair=Repair(refit=True))
    table = study.sweep({"even": RECIPES["uniform"], "again": same})
    assert table["recipe"].tolist() == ["even", "again"]
    assert table["file_bytes"].nunique() == 1 and len(list(study.runs.rglob("*.json"))) == 1


def test_a_network_that_was_trained_anew_is_run_anew(study):
    recipes = {"even": RECIPES["uniform"]}
    first = study.sweep(recipes)
    (checkpoint,) = study.checkpoints.glob("*.safetensors")
    checkpoint.unlink()
    SCHEDULES["digits", "resnet8"] = Schedule(1, 0.02, 64)
    anew = Study("quick")
    again = anew.sweep(recipes)
    assert len(list(study.runs.rglob("*.json"))) == 2 and not again.equals(first)
    accuracy = evaluate(anew.base(anew.cases[0]), *split("digits", "val"))
    assert again["base_val_accuracy"].item() == float(f"{accuracy:.6g}")


def test_a_network_may_have_knobs_of_its_own(study, monkeypatch):
    special = replace(study.profile, special={"resnet8": {"uniform": (5,)}})
    monkeypatch.setattr(study, "profile", special)
    assert study.sweep({"even": RECIPES["uniform"]}, {"uniform": (4, 8)})["knob"].tolist() == [5]


def test_more_images_have_knobs_of_their_own(study, monkeypatch):
    special = {"resnet8": {"uniform": (5,)}, "lenet5": {"more images": (2,)}}
    own = replace(study.profile, special=special, more=3)
    monkeypatch.setattr(study, "profile", own)
    knobs, recipes = {"uniform": (4, 8), "more images": (6,)}, {"even": RECIPES["uniform"]}
    found = [study.sweep(recipes, knobs, per_class=n)["knob"].tolist() for n in (3, 1, None)]
    assert found == [[6], [5], [5]]
    special["resnet8"]["more images"] = (7,)
    assert study.sweep(recipes, knobs, per_class=3)["knob"].tolist() == [7]
    monkeypatch.setattr(study, "per_class", 3)  # of all runs of the study: no more than others have
    assert study.sweep(recipes, knobs)["knob"].tolist() == [5]


def test_a_quantizer_of_ones_own_takes_the_knobs_that_are_named_by_its_class(study):
    class Mine(Uniform):
        """As a user has it: no file of the study knows it."""

    recipes = {"mine": Recipe(store=Mine(6.0))}
    assert study.sweep(recipes, {"Mine": (4, 8)})["knob"].tolist() == [4, 8]
    assert study.sweep(recipes, {"uniform": (4, 8)})["knob"].tolist() == [6]


def test_a_network_may_have_an_optimiser_of_its_own(study, monkeypatch):
    monkeypatch.setattr(study, "profile", replace(study.profile, optimisers={"resnet8": "sgd"}))
    tuned = replace(RECIPES["lrp-paper"], repair=Repair(finetune=2))
    same = replace(tuned, repair=Repair(finetune=2, optimiser="sgd"))
    recipes = {"own": tuned, "same": same, "even": RECIPES["uniform"]}
    own, same, _ = study.sweep(recipes)["val_accuracy"]
    assert own == same and len(records.read_records(study.runs)) == 2
    study.sweep({"given": tuned}, as_given=True)
    used = [row["provenance"]["recipe"] for row in records.read_records(study.runs)]
    tuners = sorted(recipe["optimiser"] for recipe in used if recipe["finetune"])
    assert tuners == ["adam", "sgd"]


def test_a_network_may_be_trained_in_its_own_way(study, monkeypatch):
    own = {"": {"steps": 4, "rate": 0.02}, "resnet8": {"steps": 2, "coded": True}}
    monkeypatch.setattr(study, "profile", replace(study.profile, trained=own))
    recipes = {"ours": Recipe(store=Trained()), "theirs": Recipe(store=ECQx(rate=0.03))}
    study.sweep(recipes)
    used = [row["provenance"]["recipe"] for row in records.read_records(study.runs)]
    asked = {
        recipe["quantizer"]: {k: v for k, v in recipe.items() if k.startswith("store.")}
        for recipe in used
    }
    assert asked == {
        "Trained": {"store.steps": 2, "store.coded": True, "store.rate": 0.02},
        "ECQx": {"store.steps": 2, "store.rate": 0.03},
    }


def test_bits_are_those_of_the_files_of_the_runs(study, monkeypatch):
    recipe = RECIPES["uniform"]
    anew = study.bits_per_layer({"even": recipe.at(3)})
    study.sweep({"even": recipe}, {"uniform": (3,)})
    (file,) = (data.CACHE / "quick" / "files").rglob("*.xaic")
    stored = {
        name: 8 * len(payload(entry)) / entry.symbols.numel()
        for name, entry in Compressed.load(file).items()
        if isinstance(entry, Codes)
    }
    monkeypatch.setattr(sweep, "prepare", None)
    kept = study.bits_per_layer({"even": recipe.at(3)})
    assert kept.equals(anew)
    assert dict(zip(kept["layer"], kept["bits"], strict=True)) == pytest.approx(stored)


def test_only_what_is_missing_is_run_after_an_interruption(study, monkeypatch):
    recipes = {
        "even": RECIPES["uniform"],
        "again": replace(RECIPES["magnitude"], remove=KeepTop(density=0.6)),
    }
    done, original = [], jobs.prepare

    def interrupted(*args, **keywords):
        done.append(args)
        if len(done) == 2:
            raise KeyboardInterrupt
        return original(*args, **keywords)

    monkeypatch.setattr(jobs, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.sweep(recipes)
    assert len(study.sweep(recipes)) == 2
    assert len(done) == 3
    assert not [path for path in study.runs.rglob(".*")]


def test_a_table_of_runs_is_the_same_once_written_and_read(study):
    table = study.sweep({"even": RECIPES["uniform"]})
    study.save_table("runs", table)
    measured, read = (t.drop(columns="knob") for t in (table, study.load_table("runs")))
    pd.testing.assert_frame_equal(read, measured, check_exact=True)


def test_files_of_prices_with_many_digits_are_found_again(study):
    recipes = {"priced": Recipe(store=RateDistortion("alike", price=10**-1.75))}
    best = study.sweep(recipes)
    study.save_models(best, recipes)
    assert len(list(study.runs.rglob("*.json"))) == 1
    assert len(list((study.results / "models").glob("*.xaic"))) == 1


def test_the_accuracy_is_that_of_the_file(study):
    row = study.sweep({"even": RECIPES["uniform"]}).iloc[0]
    (file,) = (data.CACHE / "quick" / "files").rglob("*.xaic")
    loaded = Compressed.load(file).to_model(study.base(study.cases[0]))
    assert file.stat().st_size == row["file_bytes"]
    accuracy = evaluate(loaded, *split("digits", "test"))
    assert float(f"{accuracy:.6g}") == row["test_accuracy"]


def test_the_cost_counts_what_runs_share_once(study):
    study.sweep({"even": RECIPES["uniform"]}, {"uniform": (4, 8)})
    study.sweep({"magnitude": RECIPES["magnitude"]})
    (row,) = records.cost(study.runs).to_dict("records")
    found = [json.loads(path.read_text()) for path in study.runs.rglob("*.json")]
    seconds = {"none": [], "top": []}
    for record in found:
        where = record["provenance"]
        seconds[where["recipe"]["pruning"]].append(where["threads"] * where["seconds"])
    assert (row["model"], row["seeds"], row["runs"]) == ("resnet8", 1, 3)
    assert row["core hours"] == pytest.approx(sum(map(max, seconds.values())) / 3600)
    assert records.cost(study.runs / "nothing").empty


def test_what_is_removed_is_computed_once_for_all_that_share_it(study, monkeypatch):
    calls = {"remove": 0, "prepare": 0}

    def counted(name, original):
        def call(*arguments):
            calls[name] += 1
            return original(*arguments)

        return call

    for name in calls:
        monkeypatch.setattr(jobs, name, counted(name, getattr(jobs, name)))
    recipes = {
        f"{store.knob} {tuned}": Recipe(KeepTop(density=0.5), Repair(finetune=tuned), store)
        for store in (Uniform(), RateDistortion())
        for tuned in (0, 2)
    }
    table = study.sweep(recipes, {"uniform": (4, 8), "rate-distortion": (0.01, 0.1)})
    assert len(table) == 8 and calls == {"remove": 2, "prepare": 4}
    assert len(records.read_records(study.runs)) == 8


def test_nothing_removed_makes_a_job_for_each_quantizer(study, monkeypatch):
    asked, original = [], jobs.execute
    monkeypatch.setattr(jobs, "execute", lambda *a: asked.append(a[0]) or original(*a))
    study.sweep({"a": Recipe(store=Uniform()), "b": Recipe(store=RateDistortion())},
                {"uniform": (4, 8)})  # fmt: skip
    assert sorted(len(job.variants) for job in asked) == [1, 2]


def test_accuracies_of_base_networks_are_measured_once_and_are_no_runs(study, monkeypatch):
    (case,) = study.cases
    first = study.base_accuracy(case, "val")
    assert first == evaluate(study.base(case), *split("digits", "val"))
    monkeypatch.setattr(sweep, "evaluate", None)
    assert study.base_accuracy(case, "val") == first
    assert records.read_records(study.runs) == [] and records.cost(study.runs).empty


def test_other_seeds_and_image_numbers_are_written_elsewhere(study, capsys):
    own = Study("quick")
    assert not capsys.readouterr().out
    others = [Study("quick", seed=3), Study("quick", per_class=1), Study("quick", "", 3, 1)]
    assert [other.name for other in others] == [
        "quick-seed3",
        "quick-images1",
        "quick-seed3-images1",
    ]
    assert "written to quick-seed3-images1/" in capsys.readouterr().out
    folders = [(s.results, s.figures, s.runs, s.scratch) for s in (own, *others)]
    assert all(len(set(kind)) == 4 for kind in zip(*folders, strict=True))
    assert len(others[1].references(own.cases[0])[1]) == 10 and others[0].cases[0].seed == 3
    assert Study("quick", per_class=2).name == "quick"  # the profile's own number


def test_other_image_numbers_need_no_other_networks(study, monkeypatch):
    monkeypatch.setattr(sweep, "PROFILES", {"paper": study.profile})
    (case,) = study.cases
    network = Study("paper").base(case)
    other = Study("paper", per_class=1)
    assert other.checkpoint(case) == Study("paper").checkpoint(case)
    assert other.base(case).state_dict().keys() == network.state_dict().keys()
    assert not other.checkpoints.exists() and Study("paper", seed=1).home.exists()
    assert not Study("paper", seed=1).checkpoint(replace(case, seed=1)).exists()


def test_a_data_set_and_a_network_from_outside_go_through_a_study(study, monkeypatch):
    read = DATASETS["digits"].read
    monkeypatch.setitem(DATASETS, "mine", Dataset(read, (0.3,), (0.35,)))
    with pytest.raises(ValueError, match="unknown network 'lenet300' of mine; known: "):
        Study("quick", "mine/lenet300")
    monkeypatch.setitem(SCHEDULES, ("mine", "lenet300"), Schedule(1, 0.05, 64))
    mine = Study("quick", "mine/lenet300")
    row = mine.sweep({"even": RECIPES["uniform"]}).iloc[0]
    assert (row["dataset"], row["model"]) == ("mine", "lenet300")
    assert_above(row["test_accuracy"], 20, "accuracy of the file")


def test_a_worker_with_other_code_is_refused(study):
    (case,) = study.cases
    job = jobs.Job(case, 2, (RECIPES["uniform"],), {}, code="of yesterday")
    with pytest.raises(RuntimeError, match="this worker runs other code"):
        jobs.execute(job, b"", "digits")
    assert job.code != digests.of_code()


def _die_once(mark, *arguments):
    if not mark.exists():
        mark.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return jobs.execute(*arguments)


def test_a_worker_that_dies_is_survived(study, monkeypatch, tmp_path):
    from functools import partial

    from joblib import Parallel

    def numbered(place, *arguments):
        return place, _die_once(tmp_path / "died", *arguments)

    monkeypatch.setattr(jobs, "Parallel", partial(Parallel, timeout=300))
    monkeypatch.setattr(jobs, "cpu_count", lambda: 2)
    monkeypatch.setattr(jobs, "numbered", numbered)
    table = study.sweep({"a": Recipe(store=Uniform(4)), "b": Recipe(store=RateDistortion())})
    assert (tmp_path / "died").exists() and len(table) == 2


def test_no_half_of_a_pair_is_left(study, monkeypatch):
    recipes = {"even": RECIPES["uniform"]}
    table = study.sweep(recipes, {"uniform": (3, 5)})
    study.save_models(smallest_files([table[table["knob"] == 3]], max_drop=100), recipes)
    folder = study.results / "models"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = smallest_files([table[table["knob"] == 5]], max_drop=100)
    for step in ("copyfile", "rename"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            _interrupt_second(patch, step)
            study.save_models(other, recipes)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    # killed between the two steps: what was set aside is put back
    folder.rename(study.results / ".models.old")
    study.save_models(other, recipes)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() == before.keys() and after != before
    assert sorted(path.name for path in study.results.iterdir() if "models" in path.name) == [
        "models"
    ]


def _interrupt_second(patch, step):
    from pathlib import Path

    owner = sweep.Results.replace_models.__globals__["shutil"] if step == "copyfile" else Path
    original, calls = getattr(owner, step), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    patch.setattr(owner, step, interrupted)
