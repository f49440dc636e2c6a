"""Tests under other processors, threads, folders, times: ``python tests/machines.py [NAME ...]``.

A number out of training differs between processors. So the tests that hold such numbers run under
each variant of what a machine may be; those that read and write files run in other places. A name
is part of a variant's. ``MACHINES_TESTS`` (paths, separated by spaces) replaces the tests, and
``TIMES`` is how often in a row each variant has to pass. With ``--spread`` only the tests that
measure numbers out of training run, and their ranges are written to ``spread.csv``.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import spread
from mutants.run import ROOT, tree
from torch.backends import cpu

NUMBERS = (
    "test_compress.py", "test_compress_errors.py", "test_finetune.py", "test_onnx.py",
    "test_prune.py", "test_quantizers.py", "test_recipe.py", "test_repair.py", "test_score.py",
    "test_search.py", "test_sequential.py", "test_trained.py", "test_users_files.py",
    "test_users_models.py", "study/test_cluster.py", "study/test_peers.py", "study/test_probes.py",
    "study/test_protocol.py", "study/test_survival.py", "study/test_sweep.py",
    "study/test_training.py", "study/test_verify.py", "study/test_yours.py",
)  # fmt: skip
PLACES = (
    "test_codec.py", "test_cli.py", "test_finetune.py", "study/test_data.py",
    "study/test_publish.py", "study/test_stamps.py", "study/test_sweep.py",
    "study/test_verify.py",
)  # fmt: skip
BUSY = "while True: pass"
LIMIT = 1800  # seconds for one run of one variant
TIMES = int(os.environ.get("TIMES", 1))


@dataclass
class Variant:
    """One kind of machine, or of place on it.

    Attributes
    ----------
    name : str
        What differs.
    tests : tuple of str
        Files of tests, below ``tests``.
    environment : dict of str to str or None
        Variables; None unsets one.
    around : callable, optional
        (variant, stack) -> None: enters what has to be there meanwhile, and may change the
        variant's ``folder``, ``start`` and ``prefix``; a ``NotRunError`` tells why it cannot.
    folder, start : Path
        The tree that is tested, and where from.
    prefix : list of str
        Words before Python's.
    python : str
        The interpreter.
    """

    name: str
    tests: tuple[str, ...] = NUMBERS
    environment: dict[str, str | None] = field(default_factory=dict)
    around: Callable[["Variant", ExitStack], None] = lambda *_: None
    folder: Path = ROOT
    start: Path = ROOT
    prefix: list[str] = field(default_factory=list)
    python: str = sys.executable


class NotRunError(Exception):
    """This machine cannot be like that; the message says why."""


def temporary(stack: ExitStack, name: str = "place") -> Path:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / name
    folder.mkdir()
    return folder


def busy(variant: Variant, stack: ExitStack) -> None:
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", BUSY])
        stack.callback(process.wait)
        stack.callback(process.kill)


def empty_home(variant: Variant, stack: ExitStack) -> None:
    home = str(temporary(stack))
    variant.environment = {"HOME": home, "XDG_CACHE_HOME": None, "XDG_CONFIG_HOME": None}


def elsewhere(variant: Variant, stack: ExitStack) -> None:
    variant.start = temporary(stack)


def with_a_space(variant: Variant, stack: ExitStack) -> None:
    variant.folder = variant.start = tree(temporary(stack, "a folder"), None)


def namespaces(words: str, shell: str) -> list[str]:
    """Words that run a command in namespaces of its own, after some lines of shell."""
    prefix = ["unshare", *words.split(), "sh", "-c", f'{shell}\nexec "$@"', "sh"]
    try:
        done = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        raise NotRunError("unshare is not installed") from None
    if done.returncode:
        raise NotRunError(f"unshare {words} is not allowed here")
    return prefix


def read_only(variant: Variant, stack: ExitStack) -> None:
    variant.folder = variant.start = tree(temporary(stack), None)
    lib = variant.folder / "lib"
    if os.geteuid():
        for path in [*lib.rglob("*"), lib]:
            path.chmod(path.stat().st_mode & ~0o222)
        stack.callback(lambda: [p.chmod(0o755) for p in [lib, *lib.rglob("*")]])
    else:  # root writes whatever the permissions: a mount that cannot be written
        shell = f"mount --bind '{lib}' '{lib}' && mount -o remount,ro,bind '{lib}'"
        variant.prefix = namespaces("--mount", f"{shell} || exit 9; ! touch '{lib}/x' || exit 9")


def no_network(variant: Variant, stack: ExitStack) -> None:
    loopback = "ip link set lo up 2>/dev/null || true"  # a machine without a network has it
    variant.prefix = namespaces("--net" if not os.geteuid() else "--net --map-root-user", loopback)


def has(instructions: str) -> Callable[[Variant, ExitStack], None]:
    def around(variant: Variant, stack: ExitStack) -> None:
        best = cpu.get_cpu_capability()  # AVX512 comes with AVX2
        if instructions not in ("", best) and (best, instructions) != ("AVX512", "AVX2"):
            raise NotRunError(f"this processor has no {instructions} (but {best})")

    return around


def other_python(version: str) -> Callable[[Variant, ExitStack], None]:
    def around(variant: Variant, stack: ExitStack) -> None:
        pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}*/bin/python"))
        given = os.environ.get(f"PYTHON{version.replace('.', '')}")
        found = [given] if given else [*map(str, pyenv), shutil.which(f"python{version}")]
        found = [python for python in found if python]
        if not found:
            raise NotRunError(f"no python{version} here; name one in PYTHON3xx")
        needs = "import torch, pytest, constriction, pandas, sklearn, torchvision"
        ready = [
            python
            for python in found
            if subprocess.run([python, "-c", needs], capture_output=True).returncode == 0
        ]
        if not ready:
            raise NotRunError(f"python{version} is here without torch; name another in PYTHON3xx")
        variant.python = ready[0]

    return around


PROCESSOR = {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": None, "ONEDNN_MAX_CPU_ISA": None}


def processors() -> Iterator[Variant]:
    """Processors and threads that this machine can be like; a number may differ under each."""
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    yield Variant(f"{python}, OMP_NUM_THREADS=1", environment=PROCESSOR)
    yield Variant("OMP_NUM_THREADS=2", environment=PROCESSOR | {"OMP_NUM_THREADS": "2"})
    for name, value, needed in (
        ("ATEN_CPU_CAPABILITY", "default", ""),
        ("ATEN_CPU_CAPABILITY", "avx2", "AVX2"),
        ("ONEDNN_MAX_CPU_ISA", "AVX2", "AVX2"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE", "AVX512"),
    ):
        yield Variant(f"{name}={value}", environment=PROCESSOR | {name: value}, around=has(needed))


def variants() -> Iterator[Variant]:
    """All that are tried, those first that found most."""
    yield from processors()
    yield Variant("four busy processes beside it", environment=PROCESSOR, around=busy)
    clock = {"TZ": "Pacific/Auckland", "LC_ALL": "C", "LANG": None}
    yield Variant("another time zone and locale", PLACES, clock)
    yield Variant("an empty home directory", PLACES, around=empty_home)
    yield Variant("another working directory", PLACES, around=elsewhere)
    yield Variant("a folder with a space in its name", PLACES, around=with_a_space)
    yield Variant("lib/ read-only", PLACES, around=read_only)
    yield Variant("no network", PLACES, around=no_network)
    for version in ("3.11", "3.12", "3.13"):
        if version != f"{sys.version_info.major}.{sys.version_info.minor}":
            yield Variant(f"Python {version}", around=other_python(version))


@contextmanager
def prepared(variant: Variant) -> Iterator[Variant]:
    with ExitStack() as stack:
        variant.around(variant, stack)
        yield variant


def repeated(variant: Variant, times: int) -> tuple[str, str]:
    """``outcome`` of runs in a row, up to the first that does not pass."""
    for run in range(1, times + 1):
        verdict, said = outcome(replace(variant))  # since a variant's place is changed by its run
        if verdict != "passed":
            return verdict, said if verdict == "not run" else f"run {run} of {times}: {said}"
    return verdict, said if times == 1 else f"{times} times {said}"


def outcome(variant: Variant) -> tuple[str, str]:
    """``passed``, ``FAILED`` or ``not run``; and counts, the checks that failed, or why not."""
    try:
        with prepared(variant):
            paths = [str(variant.folder), str(variant.folder / "notebooks")]
            told = os.environ | {"PYTHONPATH": os.pathsep.join(paths),
                                 "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
            told = {n: v for n, v in (told | variant.environment).items() if v is not None}
            command = [*variant.prefix, variant.python, "-m", "pytest", "--tb=short"]
            done = subprocess.run(
                [*command, *(str(variant.folder / "tests" / test) for test in variant.tests)],
                cwd=variant.start, env=told, capture_output=True, text=True, timeout=LIMIT,
            )  # fmt: skip
    except NotRunError as why:
        return "not run", str(why)
    except subprocess.TimeoutExpired:
        return "FAILED", f"not done within {LIMIT} s"
    last = (done.stdout.strip().splitlines() or [""])[-1]
    counts = ", ".join(re.findall(r"\d+ (?:passed|failed|skipped|errors?)", done.stdout))
    if done.returncode == 0:
        return "passed", counts or last
    failed = re.findall(r"^(?:FAILED|ERROR) (?:.*/)?(\S+)", done.stdout, re.M)
    print(done.stdout[-6000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
    return "FAILED", "; ".join(failed) or f"exit status {done.returncode}: {last}"


def main(names: list[str]) -> int:
    """Print the table; one if any variant failed, or none was run."""
    asked = os.environ.get("MACHINES_TESTS", "").split()
    given = tuple(path.removeprefix("tests/") for path in asked)
    if names == ["--spread"]:
        return measure(given)
    asked = [v for v in variants() if not names or any(name in v.name for name in names)]
    return run([replace(v, tests=given or v.tests) for v in asked])


def measure(given: tuple[str, ...]) -> int:
    """Run the tests that measure numbers, all or those of some files, and write their ranges."""
    tests = sorted({test for test, _ in spread.calls()})
    tests = tuple(test for test in tests if test.startswith(given or ""))
    with tempfile.TemporaryDirectory() as folder:
        asked = [
            replace(v, tests=tests, environment=v.environment | {"SPREAD_LOG": f"{folder}/{i}"})
            for i, v in enumerate(processors())
        ]
        failed = run(asked)
        spread.write(sorted(Path(folder).iterdir()), keep=bool(given))
    return failed


def run(asked: list[Variant]) -> int:
    """Try variants one after the other, and print how each went."""
    counts = {"passed": 0, "FAILED": 0, "not run": 0}
    for variant in asked:
        start = time.monotonic()
        verdict, said = repeated(variant, TIMES)
        counts[verdict] += 1
        seconds = time.monotonic() - start
        print(f"{variant.name:34} {verdict:8} {seconds:5.0f} s  {said}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 1 if counts["FAILED"] or not counts["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
