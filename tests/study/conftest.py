"""A study of one small network, in folders of its own."""

import shutil
from dataclasses import replace

import pytest

from study import Study, data, jobs, profiles
from study.bases import SCHEDULES, Schedule, base

BRIEF = Schedule(3, 0.1, 64)  # after less, ResNets are still near chance


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """Folder with the checkpoint of a network trained for a moment."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCHEDULES, ("digits", "resnet8"), BRIEF)
        base("digits", "resnet8", 0, folder)
    return folder


@pytest.fixture
def study(tmp_path, monkeypatch, trained_once):
    monkeypatch.setenv("RESULTS_ROOT", str(tmp_path / "results"))
    monkeypatch.setenv("FIGURES_ROOT", str(tmp_path / "figures"))
    monkeypatch.delenv("SCHEDULER", raising=False)
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(SCHEDULES, ("digits", "resnet8"), BRIEF)
    quick = profiles.PROFILES["quick"]
    profile = replace(quick, networks={"digits": {"resnet8": (0,)}}, per_class=2)
    monkeypatch.setitem(profiles.PROFILES, "quick", profile)
    # worker processes would not see what is patched here
    monkeypatch.setattr(jobs, "Parallel", lambda **_: lambda asked: (f(*a) for f, a, _ in asked))
    study = Study("quick")
    shutil.copytree(trained_once, study.checkpoints)
    return study
