"""The numbers that the notebooks just wrote, against the committed ones, column by column.

On the processor that wrote the committed files all columns agree exactly. Others round differently;
fine-tuning and greedy choices amplify it, and a network may then classify a few of the 360 test
images otherwise. How far that went between three processors (AVX-512 of three kinds) is what the
tolerances below allow, with as much again to spare; beyond it something has changed.

The accuracy of a network that collapsed means nothing beyond that it collapsed: any rounding
changes it by many points. Nor does its exact size, where the weights kept are those of least
relevance, ranked among zeros by rounding. So rows of networks that are still of use are compared
closely, and collapse is compared as such.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "results" / "quick"
WRITTEN = Path(os.environ.get("RESULTS_ROOT", ROOT / "results")) / "quick"
PEERS = {"nncodec.csv", "peers.csv"}  # of `make peers`, which no notebook writes
TABLES = sorted({path.name for path in COMMITTED.glob("*.csv")} - PEERS)
MAX_DROP = 1.0  # points that chosen files may lose, where their table does not say
USEFUL, COLLAPSED = 10, 30  # points lost: below, all is compared; above, that it is as bad still


@dataclass(frozen=True)
class Kind:
    """Columns that are compared alike.

    Attributes
    ----------
    names : str
        Pattern of whole column names.
    most : float
        Largest difference of a row.
    usual : float
        Largest difference that nine tenths of a table's rows stay within.
    relative : bool
        Of the committed value; else as it is.
    why : str
        Reason for the tolerance.
    """

    names: str
    most: float
    usual: float
    relative: bool
    why: str


KINDS = [
    Kind(
        "dataset|model|recipe|layer|criterion|scores|start|method|steps|seed|per_class|groups"
        "|reached|weights|float32 bytes|stored bits|stored bytes|epochs|images per class|against"
        "|max_drop",
        0, 0, False, "names and counts do not depend on rounding",
    ),
    Kind("knob", 0, 0, False, "settings are given, not computed"),
    Kind("base_.*|val|test", 0.6, 0.6, False,
         "base networks are trained in float64: two of 360 images at most"),
    Kind(".*_accuracy", 10, 2, False, "of 360 images each is 0.28 points; observed: 5 at most in a "
         "network still of use, 0.7 in nine of ten rows, 1.9 after fine-tuning (one table of eight "
         "rows)"),
    Kind("density", 0.02, 0.005, True, "ties among least scores; observed: 0.7 %, 0.1 %"),
    Kind("file_bytes|ratio|bits", 0.06, 0.03, True,
         "follows the weights kept and their symbols; observed: 2.6 %, 1 %"),
    Kind("score <= 0|of (negative|positive) weights, .*", 0.5, 0.5, False,
         "shares in percent of thousands of weights; observed: equal"),
    Kind("share", 1e-3, 1e-3, False, "conservation, computed in float64"),
    Kind("rank correlation|(epsilon|zplus|gamma|alpha2beta1)/.*", 2e-3, 2e-3, False,
         "ranks of hundreds of thousands of weights; observed: 6e-5"),
    Kind("error", 0.3, 0.1, True,
         "errors of rounding that add up over layers; observed: equal"),
    Kind("bd_rate", 60, 40, False,
         "of curves of two or three files, where one of 360 images is 0.28 of 1.8 points"),
    Kind("(root:|shuffled:|reversed:)?(lrp-.*|fisher|alike)", 0.25, 0.25, False,
         "rank correlations of 12 to 36 groups of units, where one exchange counts; observed: "
         "equal"),
]  # fmt: skip


def kind_of(column):
    found = [kind for kind in KINDS if re.fullmatch(kind.names, column)]
    assert found, f"no tolerance says how to compare the column {column!r}"
    return found[0]


def both(name):
    return pd.read_csv(COMMITTED / name), pd.read_csv(WRITTEN / name)


def test_the_notebooks_wrote_every_committed_table():
    assert TABLES
    assert sorted(path.name for path in WRITTEN.glob("*.csv")) == TABLES


@pytest.mark.parametrize("name", TABLES)
def test_tables_agree(name):
    committed, written = both(name)
    assert list(written.columns) == list(committed.columns) and len(written) == len(committed)
    # Of chosen files the setting is chosen by what was measured: it may be the next one.
    chosen = name.endswith("-smallest.csv")
    useful = pd.Series(True, committed.index)
    if "test_accuracy" in committed:
        lost, now = (t["base_test_accuracy"] - t["test_accuracy"] for t in (committed, written))
        useful = lost <= USEFUL
        gone = lost > COLLAPSED
        assert (now[gone] > COLLAPSED / 6).all(), committed[gone & (now <= COLLAPSED / 6)]
    if chosen:
        useful &= committed["knob"] == written["knob"]
        assert useful.mean() > 0.6, "most choices are the same"
    for column in committed:
        kind = kind_of(column)
        exact = kind.most == 0
        loose = chosen and column in ("knob", "reached")
        rows = committed.index if exact and not loose else committed.index[useful]
        if loose and column == "reached":  # accuracies that may move may come to either side
            margins = pd.concat([_margin(t.loc[rows]) for t in (committed, written)], axis=1)
            rows = rows[(margins > kind_of("val_accuracy").usual).all(axis=1)]
        then, now = committed.loc[rows, column], written.loc[rows, column]
        if exact:
            assert now.equals(then), (column, committed.loc[rows][now != then])
            continue
        if column == "bd_rate":  # not a number where curves have too little in common
            known = then.notna() & now.notna()
            assert (then.isna() == now.isna()).mean() > 0.6, (column, kind.why)
            then, now = then[known], now[known]
        moved = (now - then).abs() / (then.abs().clip(lower=1e-9) if kind.relative else 1)
        worst = committed.loc[moved.idxmax()].to_dict() if len(moved) else {}
        assert moved.max() <= kind.most, (column, kind.why, worst)
        if len(moved) >= 10:
            assert moved.quantile(0.9) <= kind.usual, (column, kind.why, worst)


def _margin(table):
    """Points between what a chosen file loses on the validation split and what it may lose."""
    lost = table["base_val_accuracy"] - table["val_accuracy"]
    return (lost - table.get("max_drop", MAX_DROP)).abs()


def claims(folder):
    paths = sorted(folder.glob("claims-*.json"))
    return [claim for path in paths for claim in json.loads(path.read_text())]


def test_claims_are_the_same_sentences():
    def sentences(folder):
        return [(c["id"], c["where"], c["claim"], c["expected"]) for c in claims(folder)]

    assert sentences(WRITTEN) == sentences(COMMITTED) != []


SPREAD = {
    "C1": (64, 15), "C2": (42, 20), "C3": (1, 2), "C4": (1, 3), "C4s": (1, 3), "A1": (1, 3),
    "Q1": (10, 1), "Q2": (1, 1), "B1": (96, 0.6), "R3": (0.95, 0.002), "Y3": (1, 2),
}  # fmt: skip
"""By claim its threshold, and how far from it a measured value may lie for the verdict to change.

C1 in percent: a choice of the next setting moved it by 8. C2 in percent relative; C3, C4, C4s and
A1 in points, of which 1.9 were observed, on both networks that are compared. Y3 in points, of a
network that is trained there in float32. C5, C6 and L1 are
decided by BD-rate, see ``near_in_size``. R1, R2, Q3, Y1 and Y2 have no excuse."""
BD_SPREAD = 40  # percent by which one image of 360 moves a BD-rate of two or three files


def number(text):
    """The number that the verdict is about: the last one in what was measured."""
    return float(re.findall(r"-?\d+\.\d+", text.split(" % relative")[0])[-1])


def near_in_size(text):
    """Whether a BD-rate such as ``-12.6 %`` is near zero, or curves barely have one.

    Of two or three files, one image more or less decides whether they have enough in common.
    """
    rates = [float(rate) for rate in re.findall(r"(-?\d+\.\d)(?: ± \d+\.\d)? %", text)]
    return "in common" in text or any(abs(rate) <= BD_SPREAD for rate in rates)


def within_spread(claim):
    if claim["id"] in ("C5", "C6", "L1"):
        return near_in_size(claim["ours"])
    if claim["id"] not in SPREAD:
        return False
    threshold, spread = SPREAD[claim["id"]]
    return abs(number(claim["ours"]) - threshold) <= spread


def test_verdicts_agree_except_within_the_spread_of_their_threshold(capsys):
    changed = [
        (now, then)
        for now, then in zip(claims(WRITTEN), claims(COMMITTED), strict=True)
        if now["verdict"] != then["verdict"]
    ]
    with capsys.disabled():
        print(f"\n{len(changed)} verdicts differ from the committed ones")
        for now, then in changed:
            print(f"  {now['id']} {now['where']}: {now['claim']}")
            print(f"    {then['verdict']} ({then['ours']}) -> {now['verdict']} ({now['ours']})")
    unexcused = [now for now, then in changed if not (within_spread(now) or within_spread(then))]
    assert not unexcused, unexcused
    assert len(changed) <= 0.2 * len(claims(COMMITTED))
