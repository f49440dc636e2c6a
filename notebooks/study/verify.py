"""Verification of what is committed: files decoded, networks evaluated, numbers traced back."""

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from lib import Compressed, CompressedFileError
from lib.finetune import evaluate

from . import claims, publish
from .bases import base, is_trained
from .data import DataNotFoundError, split
from .networks import build
from .profiles import Case
from .records import git, read_claims, read_records
from .sweep import Study
from .verdicts import key

TOLERANCE = 0.2
"""Points of accuracy by which processors may differ in rounding."""
ROUNDING = 1e-5
"""Relative error of numbers in tables, which are written with six digits."""

OTHERS = (claims.STANDARD, "peers", "trials")
"""Tables of other coders and of variants tried, whose rows are no runs of a study."""

_CASE = ["dataset", "model", "seed"]
_NUMBERS = ["density", "ratio", "bits", "val_accuracy", "test_accuracy"]
_RUN = [*_CASE, "per_class", "file_bytes"]

Check = tuple[str, str, Callable[[], tuple[bool, str]]]
"""What is checked, what is committed of it, and what says whether it agrees and was measured."""


def verify(study: Study) -> int:
    """Check committed numbers without computing a run anew.

    Each compressed model is decoded and evaluated, and each base network; every row of a table of
    runs must be what some run's record says, and the record must be of the same base network;
    claims must follow from the tables, and ``CLAIMS.md`` and the README's tables from the claims.
    Networks and records of the quick profile are not committed, so there these are not checked.

    The profile's ``results/<profile>`` is verified as git's HEAD has it; without git, or with
    ``RESULTS_ROOT``, as it is in that folder. Gives zero if every check that could be made passed,
    and one could be made; else one.
    """
    counts = {"pass": 0, "FAIL": 0, "no data": 0}
    with _committed(study) as (root, said):
        print(said)
        print(f"{'verdict':8} {'what':54} {'measured':>18} {'committed':>18}")
        results = root / study.name
        groups = [_models(results), _claims(results, study)]
        if (results / "runs").exists() or study.kept_beside_tables:
            groups += [_bases(results, study), _tables(results)]
        if (results / "CLAIMS.md").exists():
            groups.append(_texts(results))
        for checks in groups:
            for what, committed, check in checks:
                verdict, measured = _verdict(check)
                counts[verdict] += 1
                print(f"{verdict:8} {what:54} {measured:>18} {committed:>18}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 1 if counts["FAIL"] or not counts["pass"] else 0


def _verdict(check: Callable[[], tuple[bool, str]]) -> tuple[str, str]:
    try:
        good, measured = check()
    except DataNotFoundError:
        return "no data", ""
    except (CompressedFileError, FileNotFoundError) as error:
        print(error)
        good, measured = False, ""
    return "pass" if good else "FAIL", measured


def _known(good: bool, measured: object = "") -> Callable[[], tuple[bool, str]]:
    """The check of what is known already."""
    return lambda: (good, str(measured))


@contextmanager
def _committed(study: Study) -> Iterator[tuple[Path, str]]:
    """The folder with the results that are verified, and a sentence that says which they are."""
    archive = None
    if "RESULTS_ROOT" not in os.environ:
        archive = git("archive", "HEAD", "README.md", "results")
    if archive is None:
        yield study.results.parent, f"the files of {study.results} are verified"
        return
    commit = (git("rev-parse", "--short", "HEAD") or b"").decode().strip()
    changed = git("status", "--porcelain", "--", f"results/{study.name}") or b""
    said = f"commit {commit} (git HEAD) is verified"
    if changed:
        said += f"; {len(changed.splitlines())} files of results/{study.name} differ from it now"
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        yield Path(folder) / "results", said


def _models(results: Path) -> Iterator[Check]:
    """Size and accuracy of the compressed models."""
    records = sorted(results.glob("models*/*.json"))
    if not records:
        yield "no model is committed", "", _known(False)
    for record in records:
        row = json.loads(record.read_text())
        committed = f"{row['test_accuracy']:.2f} {row['file_bytes']:>9}"
        yield record.stem, committed, partial(_model, row, record.with_suffix(".xaic"))


def _model(row: dict, path: Path) -> tuple[bool, str]:
    images, labels = split(row["dataset"], "test")
    empty = build(row["model"], channels=images.shape[1])
    measured = evaluate(Compressed.load(path).to_model(empty), images, labels)
    size = path.stat().st_size
    good = size == row["file_bytes"] and abs(measured - row["test_accuracy"]) <= TOLERANCE
    return good, f"{measured:.2f} {size:>9}"


def _bases(results: Path, study: Study) -> Iterator[Check]:
    """Accuracy of the base networks in ``bases.csv`` that belong to the study."""
    table = _base_table(results)
    if table.empty:
        yield "no base network is committed", "", _known(False)
    for row in table.to_dict("records"):
        case = Case(row["dataset"], row["model"], row["seed"])
        if case in study.cases:
            check = partial(_base, case, results / "checkpoints", row["test"])
            yield f"base {case}", f"{row['test']:.2f}", check


def _base(case: Case, folder: Path, committed: float) -> tuple[bool, str]:
    if not is_trained(*astuple(case), folder):
        return False, "no checkpoint"
    measured = evaluate(base(*astuple(case), folder), *split(case.dataset, "test"))
    return abs(measured - committed) <= TOLERANCE, f"{measured:.2f}"


def _tables(results: Path) -> Iterator[Check]:
    """Rows of the tables that records of runs account for; by how many versions of the code."""
    known = pd.DataFrame(read_records(results / "runs"))
    same = {"val": "base_val_accuracy", "test": "base_test_accuracy"}
    bases = _base_table(results).rename(columns=same)
    if known.empty or bases.empty:
        yield "no record of a run is committed", "", _known(False)
        return
    known["code"] = known["provenance"].str["code"]
    for name, table in _run_tables(results):
        runs = _agreeing(table, known, _RUN, _NUMBERS, "code")
        based = _agreeing(table, bases, _CASE, [*same.values()])
        count = len(set(runs["index"]) & set(based["index"]))
        yield f"rows of {name} from runs", str(len(table)), _known(count == len(table), count)
        if (codes := runs["code"].nunique()) > 1:
            print(f"{name}: its rows come from {codes} versions of the code")


def _claims(results: Path, study: Study) -> Iterator[Check]:
    """Claims against what the same functions say of the tables."""
    rows = read_claims(results)
    committed = {key(row): row for row in rows}
    again = claims.from_tables(
        lambda name: pd.read_csv(results / f"{name}.csv"), study.profile.finetune, rows
    )
    good = 0
    for row in again:
        before = committed.pop(key(row), {"verdict": "not there", "ours": ""})
        if before == row:
            good += 1
            continue
        print(f"{row['id']} {row['where']}: {row['ours']}, not {before['ours']}")
        yield f"{row['id']} {row['where']}", before["verdict"], _known(False, row["verdict"])
    if good:
        yield "claims that follow from the tables", str(len(again)), _known(True, good)


def _texts(results: Path) -> Iterator[Check]:
    """``CLAIMS.md`` and the README's tables."""
    same = (results / "CLAIMS.md").read_text() == publish.claims_text(results)
    yield "CLAIMS.md from the claims", "", _known(same)
    readme = results.parents[1] / "README.md"
    if readme.exists():
        same = publish.filled(readme.read_text(), readme.parent) == readme.read_text()
        yield "tables of README.md from results/", "", _known(same)


def _run_tables(results: Path) -> Iterator[tuple[str, pd.DataFrame]]:
    for path in sorted(results.glob("*.csv")):
        table = pd.read_csv(path)
        if "file_bytes" in table and path.stem not in OTHERS:
            yield path.name, table


def _base_table(results: Path) -> pd.DataFrame:
    path = results / "bases.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame()


def _agreeing(
    table: pd.DataFrame, known: pd.DataFrame, keys: list[str], numbers: list[str], *more: str
) -> pd.DataFrame:
    """Rows, by position in ``index``, whose numbers some known row of the same keys has."""
    pairs = table[keys + numbers].reset_index().merge(known[[*keys, *numbers, *more]], on=keys)
    told, found = (pairs[[f"{name}_{side}" for name in numbers]].to_numpy() for side in "xy")
    return pairs[np.isclose(told, found, rtol=ROUNDING, atol=0).all(axis=1)]
