"""Which architectures are scored, rightly, compressed, loaded elsewhere, written as ONNX.

    pip install ".[architectures,onnx]"
    python bench/architectures.py --jobs 8 --limit 60 --models "timm/*"

Random weights, nothing downloaded. Each architecture runs in processes of its own, so that neither
a crash nor a lack of time of one affects another. Writes bench/architectures.csv row by row (what
stands there is not tried again, unless with ``--again``) and bench/ARCHITECTURES.md at the end.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import csv
import json
import multiprocessing
import resource
import sys
import tempfile
import time
import warnings
from fnmatch import fnmatchcase
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import reference as independent  # noqa: E402  from the folders above
import torch  # noqa: E402
import zoo  # noqa: E402

from lib import Compressed, Recipe, compress, to_onnx, weight_relevance  # noqa: E402
from lib.quantize import Uniform  # noqa: E402
from lib.relevance import UnsupportedLayerError  # noqa: E402

HERE = Path(__file__).parent
TABLE, SUMMARY = HERE / "architectures.csv", HERE / "ARCHITECTURES.md"
COLUMNS = ("model", "weights", "input", "scored", "why", "difference", "values", "compressed",
           "loaded", "onnx", "seconds")  # fmt: skip
CLOSE = 1e-4  # relative difference of a weight's scores; models that round to float32 have 1e-5
PATIENCE = 10  # seconds waited for one of the processor
WHOLE = 0.9  # share of the weights in matrices from which a network counts as scored
SAME = 1e-4  # of logits computed in two processes, relative to how they vary over inputs


def logits_of(out):
    """What ``output=`` gets for models of transformers."""
    return out if isinstance(out, torch.Tensor) else out.logits


def score(name: str, folder: Path, note) -> None:
    """Score in float64, compare with the reference, compress, save."""
    note(scored="not built", why="out of time")
    try:
        network, inputs = zoo.build(name)
    except ValueError as error:
        note(scored="not built", why=str(error)[:300])
        return
    weights = sum(p.numel() for p in network.parameters())
    shape = "x".join(map(str, inputs.shape[1:]))
    note(weights=weights, input=shape, scored="no", why="out of time")
    labels = torch.arange(len(inputs)) % zoo.CLASSES
    double = network.double()
    exact = inputs.double() if inputs.is_floating_point() else inputs
    try:
        scores = weight_relevance(double, exact, labels, output=logits_of)
    except (UnsupportedLayerError, ValueError) as error:
        note(scored="refused", why=str(error))
        return
    matrices = sum(p.numel() for p in double.parameters() if p.dim() > 1)
    share = sum(s.numel() for s in scores.values()) / matrices
    whole = share > WHOLE
    why = "" if whole else f"{share:.0%} of what is stored in matrices has a score"
    note(scored="yes" if whole else "partly", why=why, values="out of time")
    network.register_forward_hook(lambda module, given, out: logits_of(out))
    try:
        wanted = independent.reference(double, exact, labels, list(scores))
    except Exception as error:  # whatever the tracer does not follow
        note(values=f"no reference ({type(error).__name__}: {error})"[:200])
    else:
        largest = max(float(w.norm()) for w in wanted.values())
        difference = max(
            float((scores[n] - w).norm() / (w.norm() + 1e-9 * largest + 1e-300))
            for n, w in wanted.items()
        )
        note(difference=f"{difference:.1g}", values="right" if difference < CLOSE else "WRONG")
        del wanted
    del scores, double, network
    note(compressed="out of time")
    network, inputs = zoo.build(name)
    network.register_forward_hook(lambda module, given, out: logits_of(out))
    compressed = compress(network, inputs, labels, Recipe(store=Uniform(bits=8)))
    size = compressed.save(folder / "model.xaic")
    note(compressed=f"{4 * weights / size:.1f}x")
    with torch.no_grad():
        torch.save(compressed.to_model(network)(inputs), folder / "logits.pt")


def load(name: str, folder: Path, note) -> None:
    """Read the file back in another process."""
    note(loaded="out of time")
    network, inputs = zoo.build(name)
    for p in network.parameters():
        p.data.zero_()  # all that counts comes from the file
    network.register_forward_hook(lambda module, given, out: logits_of(out))
    again = Compressed.load(folder / "model.xaic").to_model(network)
    wanted = torch.load(folder / "logits.pt")
    with torch.no_grad():
        gap = float((again(inputs) - wanted).abs().max())
    spread = float((wanted - wanted.mean(0)).abs().max())  # 0 where all inputs give the same
    note(loaded="yes" if gap <= SAME * spread else f"DIFFERS by {gap:.1g} of {spread:.1g}")


def export(name: str, folder: Path, note) -> None:
    """Write the decoded network as ONNX, which compares outputs."""
    note(onnx="out of time")
    network, inputs = zoo.build(name)
    network.register_forward_hook(lambda module, given, out: logits_of(out))
    try:
        to_onnx(Compressed.load(folder / "model.xaic"), network, inputs, folder / "model.onnx")
    except ImportError:
        note(onnx="not tried")
    except ValueError as error:
        note(onnx=f"no: {error}"[:200])
    else:
        note(onnx="yes")


PHASES = (score, load, export)


def _phase(number: int, name: str, folder: Path, limit: int) -> None:
    """In a process of its own; results so far stand in a file, whatever happens next."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))  # ends it, however busy the machine
    for stream in (1, 2):  # exporters print
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    notes: dict[str, object] = {}

    def note(**more: object) -> None:
        notes.update(more)
        path = folder / f"{number}.json"
        path.with_suffix(".part").write_text(json.dumps(notes))
        path.with_suffix(".part").replace(path)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            PHASES[number](name, folder, note)
        except BaseException as error:  # a crash of the library is a result, too
            kind = f"CRASHED ({type(error).__name__}: {error})"[:300]
            unknown = {key for key, value in notes.items() if value == "out of time"}
            note(**{key: kind for key in unknown or {("why", "loaded", "onnx")[number]}})
    os._exit(0)  # without waiting for whatever a library started


class Job:
    """One architecture, phase after phase."""

    def __init__(self, name: str, limit: int):
        self.name, self.limit = name, limit
        self.folder = tempfile.TemporaryDirectory()
        self.number, self.began = -1, time.monotonic()
        self.next()

    def next(self) -> bool:
        """Start the next phase; False if there is none."""
        self.number += 1
        path = Path(self.folder.name)
        if self.number == len(PHASES) or (self.number and not (path / "logits.pt").exists()):
            return False
        arguments = (self.number, self.name, path, self.limit)
        self.process = multiprocessing.get_context("fork").Process(target=_phase, args=arguments)
        self.process.start()
        self.until = time.monotonic() + PATIENCE * self.limit
        return True

    def running(self) -> bool:
        """Whether there is still something to wait for; ends what takes too long."""
        if self.process.is_alive():
            if time.monotonic() < self.until:
                return True
            self.process.kill()
        self.process.join()
        return self.next()

    def row(self) -> dict[str, object]:
        """What the phases noted."""
        row: dict[str, object] = {"model": self.name}
        for number in range(len(PHASES)):
            path = Path(self.folder.name) / f"{number}.json"
            row |= json.loads(path.read_text()) if path.exists() else {}
        row["seconds"] = round(time.monotonic() - self.began)
        self.folder.cleanup()
        return {key: " ".join(str(value).split()) for key, value in row.items()}


def read() -> dict[str, dict]:
    """Rows of the table so far, by model."""
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def write(rows: dict[str, dict], order: list[str]) -> None:
    """The whole table, in a fixed order."""
    with TABLE.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(sorted(rows.values(), key=lambda row: order.index(row["model"])))


BEYOND = (
    "The reference knows gates that are made of one sigmoid. One that is a product of two, as in "
    "WavLM, is halved there; that the library's values are those of the equation is a test "
    "(`tests/test_gates.py`)."
)


def summary(rows: list[dict], order: list[str]) -> str:
    """What the table says, in Markdown."""
    import timm
    import torchvision
    import transformers

    built = [row for row in rows if row["scored"] != "not built"]
    lines = [
        "# Architectures that are scored",
        "",
        "Written by `bench/architectures.py` from `architectures.csv`; torch "
        f"{torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}, "
        f"transformers {transformers.__version__}. Random weights, small inputs; scores in float64 "
        "against an independent reference (`bench/reference.py`), files of 8 bits a weight.",
        "",
        "| | tried | scored | values right / compared | compressed | loaded elsewhere | ONNX |",
        "|:-|-:|-:|-:|-:|-:|-:|",
    ]
    for library in ("torchvision", "timm", "transformers", ""):
        own = [row for row in built if row["model"].startswith(library)]
        if not own:
            continue
        scored = [row for row in own if row["scored"] == "yes"]
        right = sum(row["values"] == "right" for row in own)
        compared = sum(bool(row["difference"]) for row in own)
        packed = sum(row["compressed"].endswith("x") for row in own)
        loaded, onnx = (sum(row[key] == "yes" for row in own) for key in ("loaded", "onnx"))
        known = sum(name.startswith(library) for name in order)
        lines.append(
            f"| {library or 'all'} | {len(own)} of {known} | {len(scored)} "
            f"({len(scored) / len(own):.0%}) "
            f"| {right} / {compared} | {packed} | {loaded} | {onnx} |"
        )
    kinds = (
        ("Not scored", lambda row: row["scored"] != "yes", "why"),
        ("Scored, not found right", lambda row: row["values"] not in ("right", ""), "values"),
        ("Not compressed", lambda row: row["values"] and not row["loaded"], "compressed"),
        ("Not loaded", lambda row: row["loaded"] not in ("yes", ""), "loaded"),
    )
    for title, chosen, key in kinds:
        if some := [row for row in built if chosen(row)]:
            lines += ["", f"## {title}", ""]
            lines += [f"- `{row['model']}`: {row[key].replace('|', '/')}" for row in some]
    if any(row["values"] == "WRONG" for row in built):
        lines += ["", BEYOND]
    if missing := [row["model"] for row in rows if row["scored"] == "not built"]:
        lines += ["", "Not built from a small configuration, so not counted: "
                  + ", ".join(f"`{name}`" for name in missing) + "."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--limit", type=int, default=120, help="processor seconds of each phase")
    parser.add_argument("--total", type=float, default=1e9, help="seconds after which none begins")
    parser.add_argument("--models", default="*", help="pattern, as in 'timm/*'")
    parser.add_argument("--smallest", action="store_true", help="those of fewest weights first")
    parser.add_argument("--again", action="store_true", help="also what is in the table already")
    options = parser.parse_args()
    order = zoo.names()  # imports every library once, before processes are made from this one
    rows = {name: row for name, row in read().items() if name in order}
    waiting = [
        name for name in order
        if fnmatchcase(name, options.models) and (options.again or name not in rows)
    ][::-1]  # fmt: skip
    if options.smallest:
        waiting.sort(key=zoo.size, reverse=True)
    last, jobs = time.monotonic() + options.total, []
    while waiting or jobs:
        if time.monotonic() > last:
            waiting.clear()
        while waiting and len(jobs) < options.jobs:
            jobs.append(Job(waiting.pop(), options.limit))
        for job in [job for job in jobs if not job.running()]:
            jobs.remove(job)
            rows[job.name] = row = job.row()
            write(rows, order)
            shown = (row.get(key, "") for key in ("scored", "why", "values", "loaded", "onnx"))
            print(f"{job.name}: {', '.join(filter(None, shown))[:200]}", flush=True)
        time.sleep(0.05)
    write(rows, order)
    SUMMARY.write_text(summary(list(read().values()), order))


if __name__ == "__main__":
    main()
