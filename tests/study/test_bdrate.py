import operator

import numpy as np
import pandas as pd
import pytest

from study.bdrate import (
    APART,
    NEVER_OURS,
    NEVER_THEIRS,
    Difference,
    bd_rate,
    bd_rates,
    bd_table,
    bd_text,
    bd_verdict,
)
from study.verdicts import FAILS, HOLDS, OPEN

LOST = np.array([0.0, 0.3, 0.7, 1.2, 2.5])
SIZES = np.array([90e3, 60e3, 41e3, 30e3, 17e3])


def curve(lost, sizes, base=98.0):
    lost = np.asarray(lost, dtype=float)
    return pd.DataFrame(
        {"file_bytes": sizes, "test_accuracy": base - lost, "base_test_accuracy": base}
    )


REFERENCE = curve(LOST, SIZES)


@pytest.mark.parametrize("factor", [0.5, 0.97, 1.0, 3.0])
def test_files_that_are_all_so_many_times_larger(factor):
    found = bd_rate(curve(LOST, factor * SIZES), REFERENCE)
    assert found.percent == pytest.approx(100 * (factor - 1)) and found.why == ""


def test_exponential_curves_have_a_closed_form():
    # log bytes a - b x, straight in points lost: the mean difference is that at the range's middle
    at = np.linspace(0, 3, 7)
    ours, theirs = curve(at, np.exp(9 - 0.8 * at)), curve(at, np.exp(8.7 - 0.5 * at))
    assert bd_rate(ours, theirs).percent == pytest.approx(100 * np.expm1(0.3 - 0.3 * 1.1))
    crossing = curve(at, np.exp(9 + 0.33 - 1.1 * 0.3 - 0.5 * at - 0.3 * (at - 1.1)))
    level = curve(at, np.exp(9 - 0.5 * at))
    assert bd_rate(crossing, level).percent == pytest.approx(0, abs=1e-9)  # won before, lost after


def test_curves_are_compared_where_both_are():
    at = np.array([0.4, 1.0, 1.6])
    ours = curve(at, np.exp(9 - at))
    theirs = curve([0.0, 3.0], np.exp([9.0, 8.1]))  # log bytes 9 - 0.3 x
    assert bd_rate(ours, theirs).percent == pytest.approx(100 * np.expm1(-0.7 * 1.0))


def test_neither_units_nor_the_order_of_files_matter():
    ours = curve(LOST + 0.1, SIZES * np.array([0.8, 0.9, 0.7, 0.8, 0.9]))
    expected = bd_rate(ours, REFERENCE).percent
    kilobytes = [part.assign(file_bytes=part["file_bytes"] / 1000) for part in (ours, REFERENCE)]
    assert bd_rate(*kilobytes).percent == pytest.approx(expected)
    mixed = [part.sample(frac=1, random_state=3) for part in (ours, REFERENCE)]
    assert bd_rate(*mixed).percent == expected
    doubled = [pd.concat([part, part]) for part in (ours, REFERENCE)]
    assert bd_rate(*doubled).percent == expected


def test_which_curve_is_named_first_is_the_sign_of_the_logarithm():
    ours = curve(LOST + 0.1, 0.8 * SIZES)
    one, other = bd_rate(ours, REFERENCE).percent, bd_rate(REFERENCE, ours).percent
    assert one < 0 < other
    assert (1 + one / 100) * (1 + other / 100) == pytest.approx(1)


def test_of_files_that_others_beat_nothing_remains():
    expected = bd_rate(curve(LOST, 0.7 * SIZES), REFERENCE).percent
    beaten = [(0.9, 50e3), (0.71, 41e3), (40.0, 17e3), (0.3, 61e3), (9.0, 80e3)]
    more = pd.concat([REFERENCE, curve(*zip(*beaten, strict=True))])
    assert bd_rate(curve(LOST, 0.7 * SIZES), more).percent == pytest.approx(expected)


def test_a_curve_is_not_continued_beyond_its_ends():
    half = curve([0.2, 1.1], [60e3, 30e3])
    assert bd_rate(half, REFERENCE).why == ""  # 0.9 of 1.8 points
    short = curve([0.2, 1.09], [60e3, 30e3])
    for pair in [(short, REFERENCE), (REFERENCE, short)]:
        found = bd_rate(*pair)
        assert np.isnan(found.percent) and found.why == APART
    far = curve([2.1, 5.0], [60e3, 30e3])
    assert bd_rate(far, REFERENCE).why == NEVER_OURS
    assert bd_rate(REFERENCE, far).why == NEVER_THEIRS
    assert bd_rate(curve([0.5], [1.0]), REFERENCE).why == APART  # one file makes no curve


NO = float("nan")


def rates(differences):
    return pd.DataFrame(differences).rename(columns={"percent": "bd_rate"})


@pytest.mark.parametrize(
    "percents, wanted, verdict",
    [
        ([-5.0], operator.lt, HOLDS),
        ([5.0], operator.lt, FAILS),
        ([0.0], operator.lt, FAILS),
        ([0.0], operator.le, HOLDS),
        ([-5.0, -5.5, -4.5], operator.lt, HOLDS),
        ([5.0, 5.5, 4.5], operator.le, FAILS),
        ([-5.0, -20.0, 3.0], operator.lt, OPEN),
        ([NEVER_OURS], operator.lt, FAILS),
        ([-5.0, NEVER_OURS], operator.lt, FAILS),
        ([NEVER_THEIRS], operator.lt, HOLDS),
        ([-5.0, NEVER_THEIRS], operator.lt, HOLDS),
        ([5.0, NEVER_THEIRS], operator.lt, OPEN),
        ([APART], operator.lt, OPEN),
        ([-5.0, -5.1, APART], operator.lt, OPEN),
    ],
)
def test_verdicts_go_by_the_interval_and_where_there_is_none_by_the_reason(
    percents, wanted, verdict
):
    found = [Difference(NO, p) if isinstance(p, str) else Difference(p) for p in percents]
    assert bd_verdict(rates(found), wanted) == verdict


def test_what_is_not_a_number_is_told_with_its_reason():
    some = [Difference(-5.0), Difference(-7.0), Difference(NO, APART)]
    assert bd_text(rates(some)) == f"-6.0 ± 12.7 %, {APART} (1 of 3 seeds)"
    assert bd_text(rates([Difference(NO, APART)] * 2)) == APART


def test_pairs_are_compared_seed_by_seed():
    parts = [
        curve(LOST, factor * (1 + seed) * SIZES).assign(recipe=name, seed=seed)
        for seed, ratio in enumerate((0.5, 0.6))
        for name, factor in (("ours", ratio), ("theirs", 1.0))
    ]
    alone = curve(LOST, SIZES).assign(recipe="ours", seed=0, model="other")
    table = pd.concat([pd.concat(parts).assign(model="m"), alone]).assign(dataset="d")
    found = bd_rates(table, [("ours", "theirs"), ("theirs", "ours")])
    assert found["bd_rate"].tolist() == pytest.approx([-50, 100, -40, 200 / 3])
    assert set(found["model"]) == {"m"}  # the other network has no rival
    shown = bd_table(found)
    assert shown.columns.tolist() == ["recipe", "against", "d-m"]
    assert shown["d-m"].tolist()[0].startswith("-45.0 ± ")
