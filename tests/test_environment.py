"""pyproject.toml, requirements.lock and environment.yml describe one environment."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = (ROOT / "requirements.lock").read_text().splitlines()
LOCK = [Requirement(line) for line in LINES if line and not line.lstrip().startswith("#")]
ASKED = PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), [])


@pytest.mark.parametrize("asked", map(Requirement, ASKED), ids=str)
def test_lock_pins_what_the_project_asks_for(asked):
    pins = [pin for pin in LOCK if pin.name == asked.name]
    assert pins, f"{asked.name} is not locked"
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and asked.specifier.contains(specifier.version)


def test_installed_versions_are_the_locked_ones():
    for pin in LOCK:
        if pin.marker is None or pin.marker.evaluate():
            (specifier,) = pin.specifier
            assert importlib.metadata.version(pin.name) == specifier.version, pin.name


def test_conda_users_get_the_same_set():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["--requirement requirements.lock", "--no-deps --editable ."]
    (python,) = [entry for entry in conda if entry.startswith("python=")]
    version = python.removeprefix("python=")
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(version)
    assert {re.split("[=<>]", entry)[0] for entry in conda} == {"python", "make", "pip"}
