"""Notebooks run by make, in a checkout of links whose path has spaces."""

import os
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pytest

from study.paths import ROOT

PARAMETERS = 'profile = "quick"\ndatasets = ""\nseed = 0\nper_class = 0'
SAVE = """import pandas as pd
from study.results import Results
Results("quick").save_table("table", pd.DataFrame({"a": [%d]}))"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    root = tmp_path / "a checkout"
    (root / "notebooks").mkdir(parents=True)
    for name in ("lib", "notebooks/study", ".venv"):
        (root / name).symlink_to((ROOT / name).resolve())
    for name in ("requirements.lock", "pyproject.toml"):
        (root / name).touch()
        os.utime(root / name, (0, 0))  # older than the environment
    shutil.copy(ROOT / "Makefile", root)
    for name in ("RESULTS_ROOT", "CACHE_ROOT", "FIGURES_ROOT", "MAKEFLAGS", "MAKELEVEL"):
        monkeypatch.delenv(name, raising=False)
    return root


def write(checkout, source, name="00-one", parameters=PARAMETERS):
    cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [cell, nbformat.v4.new_code_cell(source)]
    content = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(content, checkout / "notebooks" / f"{name}.ipynb")


def make(checkout, *words):
    done = subprocess.run(["make", *words], cwd=checkout, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_notebook_that_fails_names_itself_and_its_cell(checkout):
    write(checkout, "1 / 0")
    code, said = make(checkout, "run-00-one")
    assert code and 'Exception encountered at "In [3]"' in said and "ZeroDivisionError" in said
    assert "00-one.ipynb stopped" in said


def test_a_notebook_without_the_parameters_is_refused(checkout):
    write(checkout, "1", parameters='profil = "quick"\ndatasets = ""\nseed = 0\nper_class = 0')
    code, said = make(checkout, "run-00-one")
    assert code and "00-one.ipynb has no parameter profile" in said


def test_a_notebook_is_skipped_until_something_changes(checkout):
    def ran():
        code, said = make(checkout, "run-00-one")
        assert code == 0, said
        return "up to date" not in said

    table = checkout / "results" / "quick" / "table.csv"
    write(checkout, SAVE % 1)
    assert ran() and table.read_text() == "a\n1\n"
    os.utime(table, (0, 0))  # neither its time ...
    assert not ran()
    table.write_text("a\n2\n")  # ... but its content counts
    assert ran() and table.read_text() == "a\n1\n"
    write(checkout, SAVE % 3)
    assert ran() and table.read_text() == "a\n3\n"


def test_notebooks_run_side_by_side_and_the_last_one_after_them(checkout):
    wait = (
        "import pathlib, time\npathlib.Path('../{0}').touch()\nend = time.time() + 120\n"
        "while not pathlib.Path('../{1}').exists(): assert time.time() < end"
    )
    write(checkout, wait.format("one", "two"))
    write(checkout, wait.format("two", "one"), "01-two")
    write(checkout, "import pathlib\nassert pathlib.Path('../one').exists()\n"
                    "pathlib.Path('../last').touch()", "09-paper")  # fmt: skip
    code, said = make(checkout, "reproduce", "DATASETS=digits/lenet300")
    assert code == 0, said
    assert (checkout / "last").exists() and "0 of 0 claims hold" in said
    assert (checkout / ".cache" / "quick" / "stamps" / "09-paper.json").exists()


def test_only_one_at_a_time_and_a_killed_one_leaves_no_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path))
    lock = [sys.executable, "-m", "study", "lock"]
    first = subprocess.Popen([*lock, "sh", "-c", "echo held; exec sleep 600"], stdout=-1, text=True)
    assert first.stdout.readline() == "held\n"
    second = subprocess.Popen([*lock, "echo", "done"], stdout=-1, text=True)
    assert "waiting for its end" in second.stdout.readline()
    time.sleep(0.5)
    assert second.poll() is None
    first.send_signal(signal.SIGKILL)
    assert second.communicate(timeout=60)[0] == "done\n" and second.returncode == 0
    first.wait()
    first.stdout.close()


def test_command_line_says_what_is_known_and_fails():
    command = [sys.executable, "-m", "study", "bases", "--profile", "fast"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown profile 'fast'; known: quick, paper" in done.stderr


INTERRUPTED = """
import builtins, sys
from study import __main__
plain = builtins.__import__
def interrupted(name, *arguments):
    if name == "torch":
        raise KeyboardInterrupt
    return plain(name, *arguments)
builtins.__import__ = interrupted
sys.exit(__main__.main(["bases"]))
"""


def test_an_interrupt_while_modules_are_read_says_nothing():
    command = [sys.executable, "-c", INTERRUPTED]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


LIGHT = """
import sys
from study import __main__
assert __main__.main(["fresh", "00-quickstart", "--profile", "paper"]) == 1
heavy = {"torch", "numpy", "pandas", "sklearn", "matplotlib", "nbformat"} & set(sys.modules)
assert not heavy, heavy
"""


def test_asking_whether_a_notebook_is_up_to_date_imports_nothing_that_takes_long(tmp_path):
    told = os.environ | {"CACHE_ROOT": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", LIGHT], env=told, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
