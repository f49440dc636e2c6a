"""pyproject.toml, requirements.lock, environment.yml and LICENSES.md describe one environment."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCKED = [names for extra, names in EXTRAS.items() if extra != "architectures"]  # of one benchmark
ASKED = [*map(Requirement, PROJECT["dependencies"] + sum(LOCKED, []))]


def read_lock():
    """Each requirement of the lock with its hashes."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "requirements.lock").read_text(), flags=re.M)
    for line in text.replace("\\\n", " ").splitlines():
        requirement, *hashes = re.split(r"\s+--hash=", line.strip())
        yield Requirement(requirement), hashes


HASHES = {str(pin): hashes for pin, hashes in read_lock()}
LOCK = [*map(Requirement, HASHES)]


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_lock_pins_what_the_project_asks_for(asked):
    pins = [pin for pin in LOCK if pin.name == asked.name]
    assert pins, f"{asked.name} is not locked"
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and asked.specifier.contains(specifier.version)


def test_every_pin_has_hashes():
    assert len(HASHES) > 100
    for pin, hashes in HASHES.items():
        assert hashes, pin
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", value) for value in hashes), pin


def test_installed_versions_are_the_locked_ones():
    for pin in LOCK:
        if pin.marker is None or pin.marker.evaluate():
            (specifier,) = pin.specifier
            assert importlib.metadata.version(pin.name) == specifier.version, pin.name


def test_the_core_is_small():
    names = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert names == {"torch", "numpy", "scipy", "constriction"}


def test_conda_users_get_the_same_set():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["--requirement requirements.lock"]
    (python,) = [entry for entry in conda if entry.startswith("python=")]
    version = python.removeprefix("python=")
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(version)
    assert {re.split("[=<>]", entry)[0] for entry in conda} == {"python", "make", "pip"}


def test_licences_are_listed_at_the_locked_versions():
    text = (ROOT / "LICENSES.md").read_text()
    rows = re.findall(r"^\| (\S+) \| (\d\S*) \| (.+) \| \w+ \|$", text, re.M)
    listed = {f"{canonicalize_name(name)}=={version}" for name, version, _ in rows}
    assert {pin.partition("==")[0] for pin in listed} == {asked.name for asked in ASKED}
    assert listed <= {f"{pin.name}{pin.specifier}" for pin in LOCK}
    assert all(licence != "not stated" for *_, licence in rows)


def test_hooks_are_the_tools_of_the_environment():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    names = {Path(hook["entry"].split()[0]).name for hook in hooks}
    assert names == {"ruff", "mypy"} <= {Requirement(text).name for text in EXTRAS["test"]}


def test_make_works_in_a_folder_with_a_space_in_its_name(tmp_path):
    folder = tmp_path / "a b"
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "DATA_ROOT=$DATA_ROOT" >> "$0.log"\n')
    python.chmod(0o755)
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    outer = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "link", "types", "DATA_ROOT=x y"]
    done = subprocess.run(command, cwd=folder, env=outer, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    called = python.with_name("python.log").read_text().splitlines()
    assert {str(folder), f"{folder}/notebooks", f"DATA_ROOT={folder}/x y", "mypy"} <= set(called)
