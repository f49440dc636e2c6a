"""Verification of committed results: files decoded, networks evaluated, tables traced to runs."""

import json
from collections.abc import Iterator
from dataclasses import astuple
from itertools import chain

import numpy as np
import pandas as pd

from lib.bases import is_trained
from lib.codec import Compressed, CompressedFileError
from lib.data import DataNotFoundError
from lib.models import build
from lib.runs import Case, Study, read_records, split
from lib.train import evaluate

TOLERANCE = 0.2
"""Points of accuracy by which processors may differ in rounding."""
ROUNDING = 1e-5
"""Relative error of numbers in tables, which are written with six digits."""

_CASE = ["dataset", "model", "seed"]
_NUMBERS = ["density", "ratio", "bits", "val_accuracy", "test_accuracy"]

Check = tuple[str, str, str, str]


def verify(study: Study) -> int:
    """Check committed numbers without computing a run anew.

    Each compressed model is decoded and evaluated, and each base network; every row of a table of
    runs must be what some run's record says, and the record must be of the same base network.
    Networks and records of the quick profile are not committed, so there only models are checked.

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
    groups = [_models(study)]
    if study.runs.is_relative_to(study.results):
        groups += [_bases(study), _tables(study)]
    for checks in groups:
        first = next(checks, ("FAIL", "nothing committed", "", ""))
        for verdict, what, measured, committed in chain([first], checks):
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
    """Accuracy of the base networks in ``bases.csv`` that belong to the study."""
    for row in _base_table(study).to_dict("records"):
        case, committed = Case(row["dataset"], row["model"], row["seed"]), f"{row['test']:.2f}"
        if case not in study.cases:
            continue
        if not is_trained(*astuple(case), study.checkpoints):
            yield "FAIL", f"base {case}", "no checkpoint", committed
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
    known = pd.DataFrame(read_records(study.runs))
    same = {"val": "base_val_accuracy", "test": "base_test_accuracy"}
    bases = _base_table(study).rename(columns=same)
    if known.empty or bases.empty:
        return
    for path in sorted(study.results.glob("*.csv")):
        table = pd.read_csv(path)
        if "file_bytes" in table:
            traced = _agreeing(table, known, [*_CASE, "per_class", "file_bytes"], _NUMBERS)
            based = _agreeing(table, bases, _CASE, [*same.values()])
            count = len(traced & based)
            verdict = "pass" if count == len(table) else "FAIL"
            yield verdict, f"rows of {path.name} from runs", str(count), str(len(table))


def _base_table(study: Study) -> pd.DataFrame:
    path = study.results / "bases.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame()


def _agreeing(
    table: pd.DataFrame, known: pd.DataFrame, keys: list[str], numbers: list[str]
) -> set[int]:
    """Positions of the rows whose numbers some known row of the same keys has."""
    pairs = table[keys + numbers].reset_index().merge(known[keys + numbers], on=keys)
    told, found = (pairs[[f"{name}_{side}" for name in numbers]].to_numpy() for side in "xy")
    return set(pairs["index"][np.isclose(told, found, rtol=ROUNDING, atol=0).all(axis=1)])
