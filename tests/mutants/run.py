"""Planted faults: each is applied to a copy of the tree, and the tests named for it must fail.

``python tests/mutants/run.py [NAME ...]`` prints a table: by which check each fault is caught; a
name is part of a fault's, or a list's. The lists beside this file hold, for each fault, its
``name``, the ``file``, ``old`` and ``new`` text, what a reader would come to believe, and the
``tests`` that could notice.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COPIED = ("lib", "notebooks", "tests")
LINKED = ("results", "figures", ".venv")
JOBS = int(os.environ.get("JOBS", min(2, os.cpu_count() or 1)))
LIMIT = 240  # seconds for the tests of one fault
PRELOADED = (
    "torch", "torchvision.models", "scipy.stats", "sklearn.datasets", "sklearn.model_selection",
    "pandas", "matplotlib.pyplot", "hypothesis", "pytest", "constriction", "safetensors.torch",
    "joblib", "tqdm", "zennit.composites", "captum.attr", "nbformat", "PIL.Image",
)  # fmt: skip


def faults() -> list[dict]:
    """All faults of the lists, in their order."""
    lists = {path.stem: json.loads(path.read_text()) for path in sorted(HERE.glob("*.json"))}
    return [fault | {"list": name} for name, rows in lists.items() for fault in rows]


def source(file: str) -> Path:
    """The file that a fault is planted in."""
    return ROOT / file


def planted(fault: dict, text: str) -> str:
    """A file's text with the fault; ValueError unless what it replaces stands there once."""
    count = text.count(fault["old"])
    if count != 1:
        raise ValueError(f"{fault['name']}: its text stands {count} times in {fault['file']}")
    return text.replace(fault["old"], fault["new"])


def tree(folder: Path, fault: dict | None) -> Path:
    """A copy of what tests read, with the fault planted."""
    for name in COPIED:  # times of files are kept, so that what was compiled serves the copy too
        shutil.copytree(ROOT / name, folder / name)
    for name in LINKED:
        (folder / name).symlink_to((ROOT / name).resolve())
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, folder)
    if fault:
        path = folder / fault["file"]
        path.write_text(planted(fault, path.read_text()))
    return folder


class Failures:
    """Notes which checks fail, as a plugin of pytest."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            with open(self.path, "a") as file:
                file.write(f"{report.nodeid}\n")


def run_tests(folder: Path, tests: list[str], stop: bool) -> int:
    """In a process of its own: pytest on a tree, whose code goes before the checkout's."""
    import pytest
    from hypothesis import Phase, settings

    found = [Phase.explicit, Phase.generate]  # no time is spent on making what fails smaller
    settings.register_profile("mutants", phases=found, database=None)
    settings.load_profile("mutants")
    sys.dont_write_bytecode = True
    os.chdir(folder)
    paths = [str(folder), str(folder / "notebooks")]
    sys.path[:0] = paths
    for name in [name for name in os.environ if name.startswith("MAKE")]:
        del os.environ[name]
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take a second to import
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    words = ["--assert=plain", "--tb=short", f"--basetemp={folder / 'tmp'}"]
    return int(pytest.main([*words, *["-x"] * stop, *tests], [Failures(folder / "failed")]))


def side_by_side(asked: list[tuple], done: Callable[[tuple, int, Path, float], None]) -> None:
    """Run tests of several trees, each in a forked process that need not import torch again."""
    waiting, running = list(asked), {}
    while waiting or running:
        while waiting and len(running) < JOBS:
            fault, tests, stop, limit = waiting.pop(0)
            folder = Path(tempfile.mkdtemp(prefix="mutant-"))
            tree(folder, fault)
            sys.stdout.flush()
            if not (child := os.fork()):
                os.setpgid(0, 0)
                code = 70
                try:
                    code = run_tests(folder, tests, stop)
                finally:
                    os._exit(code)
            running[child] = (fault, tests), folder, time.monotonic(), limit
        time.sleep(0.05)
        for child, (what, folder, start, limit) in list(running.items()):
            seconds = time.monotonic() - start
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended and seconds > limit:
                with suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
                ended, status = os.waitpid(child, 0)
            if ended:
                del running[child]
                done(what, os.waitstatus_to_exitcode(status), folder, seconds)
                shutil.rmtree(folder, ignore_errors=True)


def failed_checks(folder: Path) -> list[str]:
    """Node ids that a run noted."""
    path = folder / "failed"
    return path.read_text().splitlines() if path.exists() else []


def verdict(code: int, folder: Path) -> tuple[bool, str]:
    """Whether a fault was caught, and by which check or why not."""
    if code == 0:
        return False, "NOT CAUGHT"
    if code == 1 and (checks := failed_checks(folder)):
        return True, checks[0]
    why = {-9: "time limit", 2: "tests cannot be collected", 4: "no such test", 5: "no such test"}
    return False, f"NOT DECIDED: {why.get(code, f'exit status {code}')}"


def chosen(names: list[str]) -> list[dict]:
    """The faults of the lists that are named, and those that hold a name; all where none is."""
    known = faults()
    lists = {fault["list"] for fault in known}

    def fits(name: str, fault: dict) -> bool:
        return name == fault["list"] if name in lists else name in fault["name"]

    for name in names:
        if not any(fits(name, fault) for fault in known):
            sys.exit(f"no fault is named {name!r}")
    return [f for f in known if not names or any(fits(name, f) for name in names)]


def main(names: list[str]) -> int:
    """Print the table; one if a fault is not caught, a list is wrong, or a clean tree fails."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    start, wrong, asked = time.monotonic(), [], []
    for fault in chosen(names):
        try:
            planted(fault, source(fault["file"]).read_text())
            asked.append((fault, fault["tests"], True, LIMIT))
        except (ValueError, OSError) as error:
            wrong.append(str(error))
    for name in PRELOADED:
        with suppress(ImportError):
            import_module(name)
    union = sorted({test for _, tests, *_ in asked for test in tests})
    files = sorted({test.partition("::")[0] for test in union})
    halves = [[t for t in union if files.index(t.partition("::")[0]) % JOBS == part]
              for part in range(JOBS)]  # fmt: skip

    def clean(what: tuple, code: int, folder: Path, seconds: float) -> None:
        if code:
            text = (folder / "log").read_text(errors="replace").splitlines()[-15:]
            wrong.append(
                f"without any fault, exit status {code}: "
                + "\n  ".join(failed_checks(folder) or text)
            )
        print(f"clean: {len(what[1])} tests in {seconds:.0f} s", flush=True)

    def fault_done(what: tuple, code: int, folder: Path, seconds: float) -> None:
        fault, _ = what
        good, said = verdict(code, folder)
        if good:
            path, _, check = said.partition("::")
            said = f"{Path(path).name}::{check}"
        print(f"{seconds:4.0f} s  {fault['name']:52} {said}", flush=True)
        if not good:
            wrong.append(f"{fault['name']}: {said}")

    side_by_side([(None, half, False, 1200) for half in halves if half], clean)
    side_by_side(asked, fault_done)
    minutes = (time.monotonic() - start) / 60
    print(f"\n{len(asked)} faults in {minutes:.1f} minutes; {len(wrong)} problems")
    for line in wrong:
        print(f"  {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
