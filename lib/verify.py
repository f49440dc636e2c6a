"""Verification of committed results: files decoded, networks evaluated, tables traced to runs."""

import json
from collections.abc import Iterator

import pandas as pd

from lib.codec import Compressed, CompressedFileError
from lib.data import DataNotFoundError
from lib.models import build
from lib.runs import Case, Study, split
from lib.train import evaluate

TOLERANCE = 0.2
"""Points of accuracy by which processors may differ in rounding."""
ROUNDING = 1e-5
"""Relative error of numbers in tables, which are written with six digits."""

Check = tuple[str, str, str, str]


def verify(study: Study) -> int:
    """Check every committed number that can be checked without computing a run anew.

    Each compressed model is decoded and evaluated, and so is each base network; each row of a
    table of runs must be what some run's record says, and each record's base network one of those.

    Parameters
    ----------
    study : Study
        Of the profile whose ``results/<profile>`` is verified.

    Returns
    -------
    int
        Zero if every check that could be made passed, and one could be made; else one.
    """
    counts = {"pass": 0, "FAIL": 0, "no data": 0}
    print(f"{'verdict':8} {'what':54} {'measured':>18} {'committed':>18}")
    for checks in (_models(study), _bases(study), _tables(study)):
        for verdict, what, measured, committed in checks:
            counts[verdict] += 1
            print(f"{verdict:8} {what:54} {measured:>18} {committed:>18}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 1 if counts["FAIL"] or not counts["pass"] else 0


def _models(study: Study) -> Iterator[Check]:
    """Size and accuracy of the compressed models."""
    for record in sorted((study.results / "models").glob("*.json")):
        row, path = json.loads(record.read_text()), record.with_suffix(".xaic")
        committed = f"{row['test_accuracy']:.2f} {row['file_bytes']:>9}"
        try:
            images, labels = split(row["dataset"], "test")
            empty = build(row["model"], channels=images.shape[1])
            measured = evaluate(Compressed.load(path).to_model(empty), images, labels)
        except DataNotFoundError:
            yield "no data", record.stem, "", committed
            continue
        except (CompressedFileError, FileNotFoundError) as error:
            print(error)
            yield "FAIL", record.stem, "", committed
            continue
        size = path.stat().st_size
        good = size == row["file_bytes"] and abs(measured - row["test_accuracy"]) <= TOLERANCE
        yield "pass" if good else "FAIL", record.stem, f"{measured:.2f} {size:>9}", committed


def _bases(study: Study) -> Iterator[Check]:
    """Accuracy of the base networks; of the cases of the study only, since each takes its time."""
    if not (study.results / "bases.csv").exists():
        return
    for row in study.load_table("bases").to_dict("records"):
        case, committed = Case(row["dataset"], row["model"], row["seed"]), f"{row['test']:.2f}"
        if case not in study.cases:
            continue
        try:
            measured = evaluate(study.base(case), *split(case.dataset, "test"))
        except DataNotFoundError:
            yield "no data", f"base {case}", "", committed
            continue
        good = abs(measured - row["test"]) <= TOLERANCE
        yield "pass" if good else "FAIL", f"base {case}", f"{measured:.2f}", committed


def _tables(study: Study) -> Iterator[Check]:
    """Rows of the tables that records of runs account for."""
    records = [json.loads(path.read_text()) for path in sorted(study.runs.rglob("*.json"))]
    if not records:
        return
    known = pd.DataFrame(records)
    for path in sorted(study.results.glob("*.csv")):
        table = pd.read_csv(path)
        if "file_bytes" in table:
            found = _accounted(table, known)
            verdict = "pass" if found == len(table) else "FAIL"
            yield verdict, f"rows of {path.name} from runs", str(found), str(len(table))


def _accounted(table: pd.DataFrame, known: pd.DataFrame) -> int:
    """How many rows say what a run of the same network, images and file says."""
    keys = ["dataset", "model", "seed", "per_class", "file_bytes"]
    numbers = [
        "density", "ratio", "bits", "val_accuracy", "test_accuracy", "base_val_accuracy",
        "base_test_accuracy",
    ]  # fmt: skip
    pairs = table[keys + numbers].reset_index().merge(known[keys + numbers], on=keys)
    apart = [
        (pairs[f"{name}_x"] - pairs[f"{name}_y"]).abs() / pairs[f"{name}_y"] for name in numbers
    ]
    return pairs[pd.concat(apart, axis=1).max(axis=1) <= ROUNDING]["index"].nunique()
