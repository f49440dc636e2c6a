"""Verification of committed results by decoding the committed models."""

import json
from pathlib import Path

from lib.codec import Compressed, CompressedFileError
from lib.data import DataNotFoundError
from lib.models import build
from lib.runs import Study, split
from lib.train import evaluate

TOLERANCE = 0.2
"""Points of accuracy by which processors may differ in rounding."""


def verify(study: Study) -> int:
    """Decode each committed model, evaluate it and compare with the committed numbers.

    Parameters
    ----------
    study : Study
        Of the profile whose ``results/<profile>/models/*.json`` and ``*.xaic`` are verified.

    Returns
    -------
    int
        Zero if every check that could be made passed, and one could be made; else one.
    """
    records = sorted((study.results / "models").glob("*.json"))
    failed = 0 if records else 1
    print(f"{'verdict':8} {'model':44} {'bytes':>9} {'accuracy':>9} {'committed':>9}")
    for record in records:
        verdict, size, measured, expected = _check(record)
        failed += verdict == "FAIL"
        print(f"{verdict:8} {record.stem:44} {size:>9} {measured:>9} {expected:>9.2f}")
    print(f"{len(records)} models, {failed} failures")
    return 1 if failed else 0


def _check(record: Path) -> tuple[str, int | str, str, float]:
    row = json.loads(record.read_text())
    expected = row["test_accuracy"]
    try:
        path = record.with_suffix(".xaic")
        size = path.stat().st_size
        images, labels = split(row["dataset"], "test")
        empty = build(row["model"], channels=images.shape[1])
        measured = evaluate(Compressed.load(path).to_model(empty), images, labels)
    except DataNotFoundError:
        return "no data", "", "", expected
    except (CompressedFileError, FileNotFoundError) as error:
        print(error)
        return "FAIL", "", "", expected
    good = size == row["file_bytes"] and abs(measured - expected) <= TOLERANCE
    return "pass" if good else "FAIL", size, f"{measured:.2f}", expected
