import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from flatten import recipe

from lib import RECIPES, Recipe, Repair
from lib.prune import KeepTop, NonPositive
from lib.quantize import RateDistortion, Tiers, Uniform
from study import digests, records
from study.bases import base, checkpoint
from study.paths import ROOT

PAPER = ROOT / "results" / "paper"
CASES = sorted(path.name for path in (PAPER / "runs").iterdir())


@pytest.mark.parametrize("case", CASES)
def test_every_committed_record_is_found_again(case):
    dataset, model, seed = case.rsplit("-", 2)
    arguments = dataset, model, int(seed[1:]), PAPER / "checkpoints"
    assert checkpoint(*arguments).exists()
    state = digests.of_tensors(base(*arguments).state_dict().values())
    paths = sorted((PAPER / "runs" / case).glob("*.json"))
    assert len(paths) > 100
    for path in paths:
        record = json.loads(path.read_text())
        told = recipe(record["provenance"]["recipe"])
        assert records.address(told, record["per_class"], state) == path.stem
        # what is written now finds itself again as well
        assert records.flat(recipe(records.flat(told))) == records.flat(told)


def test_types_of_a_flat_recipe_are_those_of_the_records():
    (first, *_) = sorted((PAPER / "runs" / CASES[0]).glob("*.json"))
    old = json.loads(first.read_text())["provenance"]["recipe"]
    for name in RECIPES:
        flat = json.loads(json.dumps(records.flat(RECIPES[name])))
        assert list(flat) == list(old)
        assert {k: type(v) for k, v in flat.items()} == {k: type(v) for k, v in old.items()}


def test_what_a_recipe_makes_no_use_of_does_not_count():
    one = Recipe(store=Uniform(8))
    assert records.flat(one) == records.flat(replace(one, repair=Repair(refit=True)))
    assert records.flat(one) == records.flat(replace(one, store=Uniform(8.0)))
    tuned = replace(one, repair=Repair(finetune=3, optimiser="sgd"))
    assert records.flat(one) != records.flat(tuned)
    twice = Recipe(NonPositive("taylor"), store=RateDistortion("taylor"))
    assert records.flat(twice)["precision"] == ""
    assert records.flat(replace(twice, store=Tiers("fisher")))["precision"] == "fisher"


def test_fields_to_come_count_only_where_they_are_set():
    @dataclass(frozen=True)
    class Later(KeepTop):
        blocks: int = 0

    plain = records.flat(Recipe(KeepTop(), store=Uniform()))
    assert records.flat(Recipe(Later(), store=Uniform())) == plain | {"pruning": "Later"}
    assert records.flat(Recipe(Later(blocks=4), store=Uniform()))["remove.blocks"] == 4


SOURCES = {
    "f-strings": 'def f(x, w):\n    return f"a{x!r:>{w}}b" "c" f"{x:.2f}" + f\'{x["k"]}\' + f""\n',
    "classes": 'class A:\n    """Doc."""\n\n    x: int = 1\n\n    def g(self):\n        """D."""\n',
    "text": "x = ['ä', '\U0001f9e0', b'\\x00', 1e-9, 3j, ..., None, True]\n",
}
INTERPRETERS = sorted(Path.home().glob(".pyenv/versions/3.1[1-9]*/bin/python"))


@pytest.mark.parametrize("name", ["f-strings", "classes", "text", "checkout"])
def test_the_digest_of_code_is_the_same_on_every_python(name):
    source = (ROOT / "notebooks/study/digests.py").read_text()
    part = source[source.index("_LATER =") : source.index('"""Fields')] + "\n"
    part += source[source.index("def of_source") :]
    texts = [SOURCES[name]] if name in SOURCES else [path.read_text() for path in digests.sources()]
    program = f"import ast, hashlib, json, sys\nfrom collections.abc import Iterator\n{part}\n"
    program += "print([of_source(text) for text in json.load(sys.stdin)])"
    here = str([digests.of_source(text) for text in texts])
    for python in INTERPRETERS or [sys.executable]:
        done = subprocess.run(
            [python, "-c", program], input=json.dumps(texts), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == here, python


def test_prose_does_not_change_the_digest_of_the_code(tmp_path, monkeypatch):
    def digest(source, name="lib/one.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
        digests.of_code.cache_clear()
        return digests.of_code()

    monkeypatch.setattr(digests, "ROOT", tmp_path)
    plain = digest("def f(x):\n    return x + 1\n")
    told = digest('"""A module."""\n\n\ndef f(x):\n    """Add."""\n    return x + 1  # one\n')
    assert plain == told != digest("def f(x):\n    return x + 2\n")
    before = digest("x = 1\n", "notebooks/study/figures.py")
    assert digest("x = 2\n", "notebooks/study/figures.py") == before
    assert digest("x = 2\n", "notebooks/study/sweep.py") != before
    digests.of_code.cache_clear()


def test_provenance_does_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    where = records._environment.__wrapped__()
    assert where["commit"] == "unknown" and where["packages"]["torch"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    records.write_json(path, [1])
    with pytest.raises(TypeError):
        records.write_json(path, [object()])
    assert json.loads(path.read_text()) == [1] and len(list(tmp_path.iterdir())) == 1
