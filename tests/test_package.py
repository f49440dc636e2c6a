"""lib as a package: what it imports, and what pip makes of it."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lib

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "lib").rglob("*.py"))
OPTIONAL = [
    *("captum", "dask", "distributed", "IPython", "joblib", "matplotlib", "nbformat", "onnx"),
    *("onnxruntime", "pandas", "papermill", "PIL", "safetensors", "sklearn", "tabulate"),
    *("torchvision", "tqdm", "zennit"),
]
WITHOUT = """
import importlib, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
import lib
names = [module.name for module in pkgutil.walk_packages(lib.__path__, "lib.")]
assert len(names) > 20, names
for name in names:
    importlib.import_module(name)
"""
PUBLIC = """
from xai_compression import (
    CRITERIA, RECIPES, Compressed, CompressedFileError, Recipe, UnsupportedLayerError, compress,
    input_relevance, run_onnx, to_onnx, unit_sensitivity, weight_relevance,
)
import sys, xai_compression
print(xai_compression.__file__)
assert "lib" not in sys.modules and "study" not in sys.modules
"""


def python(*arguments, cwd, path):
    """Run Python with `path` alone in front of the installed packages; its output."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package as pip installs it from a wheel."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    shutil.copytree(ROOT / "lib", source / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = "-m", "pip", "--quiet", "--disable-pip-version-check"
    offline = "--no-deps", "--no-index"
    python(*pip, "wheel", *offline, "--no-build-isolation", ".", cwd=source, path="")
    (wheel,) = source.glob("*.whl")
    python(*pip, "install", *offline, "--target", target, wheel, cwd=source, path="")
    return target


def test_lib_imports_without_what_only_studies_and_onnx_files_need(tmp_path):
    python("-c", WITHOUT.format(blocked=OPTIONAL), cwd=tmp_path, path=ROOT)


def test_rooms_use_only_those_that_the_package_names_above_them():
    rooms = [
        name
        for line in lib.__doc__.splitlines() if line.startswith("- ")
        for name in re.findall(r"``(\w+)``", line.partition(":")[0])
    ]  # fmt: skip
    inside = {path.relative_to(ROOT / "lib").parts[0].removesuffix(".py") for path in FILES}
    assert len(rooms) == len(set(rooms)) and set(rooms) == inside - {"__init__", "__main__"}
    found = set()
    for path in FILES:
        room, *within = path.relative_to(ROOT / "lib").with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):
            if room in rooms and isinstance(node, ast.ImportFrom) and node.level == 1 + len(within):
                for used in [node.module] if node.module else [name.name for name in node.names]:
                    other = used.partition(".")[0]
                    assert rooms.index(other) < rooms.index(room), f"{room} imports {other}"
                    found.add((room, other))
    assert {("compress", "fold"), ("quantize", "score"), ("fold", "codec")} <= found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_inside_lib_are_relative_and_none_is_of_a_study(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        tops = {name.partition(".")[0] for name in names}
        assert not tops & {"lib", "study", "xai_compression", "tests"}, (path, node.lineno)


def test_every_file_of_lib_is_in_the_package(installed):
    package = installed / "xai_compression"
    held = sorted(path.relative_to(package) for path in package.rglob("*.py"))
    assert held == [path.relative_to(ROOT / "lib") for path in FILES]
    assert (package / "py.typed").exists()


def test_the_installed_package_has_the_public_names(installed, tmp_path):
    found = python("-c", PUBLIC, cwd=tmp_path, path=installed)
    assert Path(found.strip()) == installed / "xai_compression" / "__init__.py"


def test_the_installed_command_line(installed, tmp_path):
    shown = python("-m", "xai_compression", "--help", cwd=tmp_path, path=installed)
    assert "inspect" in shown and "diff" in shown
    assert (installed / "bin" / "xai-compression").exists()


def test_no_file_is_longer_than_300_lines():
    assert not [path for path in FILES if len(path.read_text().splitlines()) > 300]
