"""``make reproduce`` killed at random moments and started again: ``python tests/survival.py``.

One run is left in peace. Others, in folders of their own, are killed and started again until they
come to their end; then they have to have written the same, apart from provenance. Every other time
the whole family of processes dies at once, as when the machine loses its power; else only make and
what it started, while the notebooks' kernels have to notice by themselves, beside the next run.

Environment: ``KILLS`` (20), ``NOTEBOOKS``, ``DATASETS``, ``PER_CLASS`` (what is run: small, unless
said otherwise) and ``RANDOM`` (seed of the moments).
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("KILLS", 20))
SMALL = {
    "NOTEBOOKS": "01-train 04-mixed-precision",
    "DATASETS": "digits/lenet300",
    "PER_CLASS": "2",
}
SHARE = 0.4  # of the time of the undisturbed run: within it each kill comes
KEPT = ("results", "figures", "cache/*/runs", "cache/*/checkpoints")  # notebooks tell their times


def written(folder: Path) -> dict[str, bytes]:
    """Content of all files by path; of records all but where they come from.

    Of checkpoints tensors and remarks: safetensors writes remarks in an order of its own each time.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    from study.digests import of_tensors

    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        if path.suffix == ".json" and b'"provenance"' in content:
            content = json.dumps({**json.loads(content), "provenance": None}).encode()
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                remarks = sorted(file.metadata().items())
            tensors = {name: of_tensors([tensor]) for name, tensor in load_file(path).items()}
            content = repr((sorted(tensors.items()), remarks)).encode()
        if not path.name.startswith("."):
            found[path.relative_to(folder).as_posix()] = content
    return found


def results(folder: Path) -> dict[str, bytes]:
    """``written`` of the folders that are compared."""
    return {
        f"{part.relative_to(folder)}/{name}": content
        for pattern in KEPT
        for part in sorted(folder.glob(pattern))
        for name, content in written(part).items()
    }


def reproduce(folder: Path) -> subprocess.Popen:
    """``make reproduce``, which writes below a folder; in a session of its own."""
    asked = [f"{name}={os.environ.get(name, value)}" for name, value in SMALL.items()]
    places = {f"{name.upper()}_ROOT": str(folder / name) for name in ("results", "figures")}
    told = {n: v for n, v in os.environ.items() if not n.startswith("MAKE")}
    told |= places | {"CACHE_ROOT": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    folder.mkdir(exist_ok=True)
    with open(folder / "log", "a") as log:
        return subprocess.Popen(
            ["make", "--no-print-directory", "reproduce", *asked], cwd=ROOT, env=told,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def kill(process: subprocess.Popen, everything: bool) -> None:
    """Without warning: make and what it started, or also the kernels and their workers."""
    import psutil

    victims: set[psutil.Process] = set()
    while everything:  # stopped first, so that none starts another meanwhile
        with suppress(psutil.NoSuchProcess):
            family = {*psutil.Process(process.pid).children(recursive=True)}
            if family <= victims:
                break
            victims |= family
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.suspend()
    os.killpg(process.pid, signal.SIGKILL)
    for member in victims:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def tail(folder: Path) -> str:
    return (folder / "log").read_text(errors="replace")[-3000:]


def survived(folder: Path, draw: random.Random, most: float, left: int) -> tuple[int, int]:
    """Kill runs, up to ``left`` of them, until one comes to its end: its exit status, and kills."""
    kills = 0
    while True:
        process = reproduce(folder)
        try:
            return process.wait(draw.uniform(0, most) if kills < left else None), kills
        except subprocess.TimeoutExpired:
            kill(process, everything=draw.random() < 0.5)
            kills += 1


def main() -> int:
    """Print a line for each folder; one if any differs from the run that was left in peace."""
    seed = int(os.environ.get("RANDOM", time.time()))
    draw, kills, wrong = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as place:
        whole, start = Path(place) / "whole", time.monotonic()
        if reproduce(whole).wait():
            print(f"make reproduce failed, though left in peace:\n{tail(whole)}")
            return 1
        seconds, names = time.monotonic() - start, results(whole)
        print(f"left in peace: {len(names)} files in {seconds:.0f} s; RANDOM={seed}", flush=True)
        while kills < KILLS:
            folder = Path(tempfile.mkdtemp(dir=place))
            code, more = survived(folder, draw, SHARE * seconds, KILLS - kills)
            kills, now = kills + more, results(folder)
            changed = sorted(n for n in names.keys() | now.keys() if names.get(n) != now.get(n))
            said = f"{len(changed)} files differ: {', '.join(changed[:9])}" if changed else "same"
            if code:
                said += f"; exit status {code}\n{tail(folder)}"
            wrong += bool(changed or code)
            print(f"killed {more} times, {kills} in all: {said}", flush=True)
    print(f"{kills} kills in {(time.monotonic() - start) / 60:.1f} minutes; {wrong} came to others")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
