"""Work that is killed, and disks that are full, read-only or damaged: nothing is lost."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from survival import written

import lib.files
from lib import RECIPES
from study import __main__, bases, publish, records
from study.data import split
from study.networks import build
from study.records import write_json
from study.training import fit

WORK = """
import time
from dataclasses import replace
from study import Study, claims, jobs, profiles, publish, smallest_files
from study.bases import SCHEDULES, Schedule
from lib import RECIPES

SCHEDULES["digits", "lenet300"] = Schedule(3, 0.05, 64)
quick = profiles.PROFILES["quick"]
profiles.PROFILES["quick"] = replace(quick, networks={"digits": {"lenet300": (0,)}}, per_class=2)
jobs.Parallel = lambda **_: lambda asked: (f(*a) for f, a, _ in asked)  # a worker dies with us
print("begin", flush=True)
study = Study("quick")
recipes = {"even": RECIPES["uniform"], "units": RECIPES["lrp-rd"]}
table = study.sweep(recipes, {"uniform": (3, 4, 5), "rate-distortion": (0.01, 0.03)})
study.save_table("table", table)
best = smallest_files([table], max_drop=100)
study.save_models(best, recipes)
bases = table.rename(columns={"base_test_accuracy": "test"}).head(1)
study.save_claims("01-train", claims.base_networks(bases))
publish.write_claims(study.results)
"""


def begun(folder):
    """The work in a process of its own, with all that it writes in a folder; has imported."""
    told = os.environ | {
        "RESULTS_ROOT": str(folder / "results"),
        "CACHE_ROOT": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    told.pop("SCHEDULER", None)
    process = subprocess.Popen([sys.executable, "-c", WORK], env=told, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"begin\n"
    return process


def files_in(folder):
    return sum(path.is_file() for path in folder.rglob("*"))


def test_killed_at_any_moment_and_started_again_the_results_are_the_same(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert begun(whole).wait(timeout=300) == 0
    draw, all_files = random.Random(0), files_in(whole)
    for first, last in ((0, 0.4), (0.4, 0.8)):
        # a moment is how much was written: seconds differ with what else the machine does
        share = draw.uniform(first, last) * all_files
        process = begun(killed)
        while files_in(killed) < share and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert begun(killed).wait(timeout=300) == 0
    names = written(whole)
    assert len(names) > 15 and any(name.endswith(".safetensors") for name in names)
    assert written(killed) == names


CLAIM = {"id": "B1", "claim": "s", "where": "a-x", "expected": "1", "ours": "0.5",
         "verdict": "holds", "seeds": [0], "holds": True, "notebook": "01-train"}  # fmt: skip


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_is_one_sentence_and_the_old_file_stays(
    number, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("RESULTS_ROOT", str(tmp_path))
    monkeypatch.setattr("study.data.CACHE", tmp_path / "cache")
    results = tmp_path / "quick"
    write_json(results / "claims-01-train.json", [CLAIM])
    publish.write_claims(results)
    before = (results / "CLAIMS.md").read_bytes()
    write_json(results / "claims-01-train.json", [CLAIM | {"ours": "0.7"}])

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lib.files.os, "fsync", refuse)
    assert __main__.main(["claims"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    assert os.strerror(number) in said and str(results / "CLAIMS.md") in said
    assert (results / "CLAIMS.md").read_bytes() == before
    assert sorted(path.name for path in results.iterdir()) == ["CLAIMS.md", "claims-01-train.json"]


FULL = """
import resource, sys
from pathlib import Path
from lib.files import write_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bytes(Path(sys.argv[1]), bytes(5000))
except OSError as error:
    print(error)
"""


def test_a_write_beyond_what_there_is_room_for_names_the_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"[Errno 27] File too large: '{path}'"
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_run_that_cannot_be_written_leaves_those_before_it(study, monkeypatch):
    knobs, original, calls = {"uniform": (3, 4, 5)}, lib.files.os.fsync, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments)

    study.base_accuracy(study.cases[0], "val"), study.base_accuracy(study.cases[0], "test")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device: '"):
        patch.setattr(lib.files.os, "fsync", full)
        study.sweep({"even": RECIPES["uniform"]}, knobs)
    kept = {path: path.read_bytes() for path in study.runs.rglob("*.json")}
    assert len(kept) == 2 and not list(study.runs.rglob(".*"))
    assert len(study.sweep({"even": RECIPES["uniform"]}, knobs)) == 3
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_half_a_record_is_named(study):
    study.sweep({"even": RECIPES["uniform"]})
    (path,) = study.runs.rglob("*.json")
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged .* remove it, to run it again"):
        study.sweep({"even": RECIPES["uniform"]})
    with pytest.raises(ValueError, match="is damaged"):
        records.cost(study.runs)
    path.unlink()
    assert len(study.sweep({"even": RECIPES["uniform"]})) == 1


def test_half_a_checkpoint_is_named_and_kept(study, tmp_path):
    path = study.checkpoint(study.cases[0])
    whole = path.read_bytes()
    for part in (whole[:200], whole[: len(whole) // 2], b""):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=f"{path.name} is damaged .*: restore it, or remove"):
            study.base(study.cases[0])
        assert path.read_bytes() == part
    path.write_bytes(whole)
    assert study.base(study.cases[0])


def test_half_a_state_of_training_is_named(tmp_path):
    images, labels = split("digits", "val")
    how = {"epochs": 1, "lr": 0.01, "checkpoint": tmp_path / "x.partial.pt"}
    fit(build("lenet300"), images, labels, **how)
    whole = how["checkpoint"].read_bytes()
    for part in (whole[: len(whole) // 2], whole[:10], b""):
        how["checkpoint"].write_bytes(part)
        with pytest.raises(ValueError, match="x.partial.pt is damaged: remove it to train"):
            fit(build("lenet300"), images, labels, **how)


def test_checkpoints_of_another_schedule_are_trained_on_rather_than_taken(study, monkeypatch):
    case = study.cases[0]
    longer = replace(bases.SCHEDULES["digits", "resnet8"], cycles=2)
    monkeypatch.setitem(bases.SCHEDULES, ("digits", "resnet8"), longer)
    assert not bases.is_trained(case.dataset, case.model, case.seed, study.checkpoints)
    asked = []
    monkeypatch.setattr(bases, "fit", lambda network, *_, **how: asked.append(how) or network)
    monkeypatch.setattr(bases.Path, "unlink", lambda *_, **__: None)
    study.base(case)
    assert [how["checkpoint"].name for how in asked] == ["digits-resnet8-s0-cycles-2.partial.pt"]
