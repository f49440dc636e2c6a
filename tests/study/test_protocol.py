"""The protocol of every run: which images decide, what seeds choose, what is measured."""

import ast
from dataclasses import replace

import pytest
import torch
from spread import assert_above

from lib import Compressed, Recipe, Repair
from lib.finetune import evaluate
from lib.prune import KeepTop
from lib.quantize import ECQx, RateDistortion, Trained, Uniform
from study import Study, bases, data, digests, jobs, records
from study.data import split
from study.profiles import Case
from study.records import address

RECIPES = {
    "relevance": Recipe(store=RateDistortion("lrp-epsilon", price=0.01)),
    "fine-tuned": Recipe(KeepTop("magnitude", density=0.5), Repair(finetune=3), Uniform(4)),
    "trained": Recipe(store=Trained("lrp-epsilon", price=0.003, steps=8)),
    "ECQx": Recipe(store=ECQx(price=0.03, steps=8)),
}


@pytest.fixture(scope="module")
def splits():
    return {part: split("digits", part) for part in data.SPLITS}


@pytest.fixture
def execute(study):
    """Run one recipe as a worker does; gives its record and its file."""
    network = jobs.pickle.dumps(study.base(study.cases[0]))

    def run(recipe, splits, seed=0, per_class=4):
        case = Case("digits", "resnet8", seed)
        job = jobs.Job(case, per_class, (recipe,), {}, digests.of_code())
        ((record, content),) = jobs.execute(job, network, splits)
        return record, content

    return run


@pytest.mark.parametrize("name", RECIPES)
def test_files_depend_on_training_images_alone(name, execute, splits):
    noise = torch.Generator().manual_seed(0)
    others = {
        part: (torch.randn(images.shape, generator=noise), labels.flip(0))
        for part, (images, labels) in splits.items()
        if part != "train"
    }
    record, content = execute(RECIPES[name], splits)
    elsewhere, same = execute(RECIPES[name], splits | others)
    assert content == same
    lost = record["test_accuracy"] - elsewhere["test_accuracy"]
    assert_above(lost, 0, f"points between test images and noise, {name}")


def test_seeds_choose_images_order_and_initial_weights(execute, splits):
    for recipe in RECIPES.values():
        assert execute(recipe, splits, seed=0)[1] != execute(recipe, splits, seed=1)[1]


def test_seeds_choose_the_order_of_fine_tuning(execute, splits, monkeypatch):
    original = jobs.sample
    monkeypatch.setattr(jobs, "sample", lambda *data: original(*data[:-1], 0))  # the same images
    files = {name: [execute(r, splits, seed)[1] for seed in (0, 1)] for name, r in RECIPES.items()}
    assert files["relevance"][0] == files["relevance"][1]
    for name in ("fine-tuned", "trained", "ECQx"):
        assert files[name][0] != files[name][1], name


def test_as_many_reference_images_as_the_record_says(execute, splits, monkeypatch):
    seen, original = [], jobs.remove
    monkeypatch.setattr(jobs, "remove", lambda *a: seen.append(a[2]) or original(*a))
    record, _ = execute(RECIPES["relevance"], splits, per_class=6)
    assert seen[0].bincount().tolist() == [6] * 10 and record["per_class"] == 6


def test_both_accuracies_are_of_the_file(execute, splits, study):
    record, content = execute(Recipe(store=Uniform(2)), splits)
    network = study.base(study.cases[0])
    loaded = Compressed.from_bytes(content).to_model(network)
    assert record["file_bytes"] == len(content)
    for part in ("val", "test"):
        assert record[f"{part}_accuracy"] == evaluate(loaded, *splits[part])
        lost = evaluate(network, *splits[part]) - record[f"{part}_accuracy"]
        assert_above(lost, 0, f"points that the file loses, {part}")


def test_base_networks_of_other_seeds_start_elsewhere_and_see_another_order(tmp_path, monkeypatch):
    starts, orders = [], []

    def fit(network, *images, seed, checkpoint, **how):
        starts.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
        orders.append(seed)
        checkpoint.touch()
        return network

    monkeypatch.setattr(bases, "fit", fit)
    for seed in (0, 1, 0):
        folder = tmp_path / str(len(orders))
        folder.mkdir()
        bases.base("digits", "resnet8", seed, folder)
    assert orders[0] == orders[2] != orders[1]
    assert torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[1])


def test_after_a_change_of_code_runs_are_done_anew(study, monkeypatch):
    before = study.runs, study.checkpoints, study.accuracies
    assert Study("quick").runs == before[0]
    monkeypatch.setattr(digests, "of_code", lambda: "c0de" * 16)
    after = Study("quick")
    assert not {after.runs, after.checkpoints, after.accuracies} & set(before)


def test_another_number_of_images_is_another_run():
    recipe = RECIPES["relevance"]
    names = {address(recipe, n, state) for n in (1, 15, 50) for state in ("one", "other")}
    assert len(names) == 6
    names |= {address(replace(recipe, store=Uniform(bits)), 15, "one") for bits in (4, 5)}
    assert len(names) == 8


def imported(path):
    """Modules of ``study`` that a module of it imports as it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return found


def test_whatever_computes_a_number_is_in_the_digest_of_code():
    root = digests.ROOT
    files = {path.relative_to(root).as_posix(): path for path in digests.sources()}
    every = {p.relative_to(root).as_posix() for f in ("lib", "notebooks/study")
             for p in (root / f).rglob("*.py")}  # fmt: skip
    assert set(files) == every and "lib/relevance/rules.py" in every
    shown = digests._SHOWN
    for name, path in files.items():
        if name.startswith("notebooks/") and path.stem not in shown:
            assert not imported(path) & shown, name


def test_records_say_by_which_code_they_were_made(study):
    study.sweep({"even": RECIPES["fine-tuned"]})
    (record,) = records.read_records(study.runs)
    assert record["provenance"]["code"] == digests.of_code()
    assert record["provenance"]["recipe"] == records.json.loads(
        records.json.dumps(records.flat(RECIPES["fine-tuned"]))
    )
