"""Curves of files against each other: BD-rate, how coders are compared, and what it decides."""

import operator
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from .tables import NETWORK, points_lost, text
from .verdicts import FAILS, HOLDS, OPEN, judge

LOST = (0.2, 2.0)
"""Points of test accuracy lost over which curves are compared."""
SHARE = 0.5
"""Of this range both curves have to cover so much in common."""


class Difference(NamedTuple):
    """How much larger the files of one curve are than those of another."""

    percent: float  # the BD-rate: negative where the first curve's files are smaller
    why: str = ""  # it is NaN: NEVER_OURS, NEVER_THEIRS or APART


NEVER_OURS, NEVER_THEIRS = "never within 2 points", "the other never within 2 points"
APART = "too few losses in common"


def bd_rate(ours: pd.DataFrame, theirs: pd.DataFrame) -> Difference:
    """Mean difference of log bytes between two curves at equal points of test accuracy lost.

    Parameters
    ----------
    ours, theirs : DataFrame
        A row for each file of one network, in any order: file_bytes, test_accuracy and
        base_test_accuracy (percent).

    Returns
    -------
    Difference
        100 (exp(d) - 1), where d is the mean of log(bytes of ours) - log(bytes of theirs) over the
        part of ``LOST`` that both curves cover. NaN where a curve has no file that loses as little
        as the range's upper end, or where this part is shorter than ``SHARE`` of the range: a curve
        is not continued beyond its ends.

    Notes
    -----
    A curve is the lower-left envelope of its files: a file stays if no other one is as small and
    loses as little. What stays loses less the larger it is, so that a loss has one size; between
    two files log bytes is linear in points lost. The integral of the difference is exact, taken
    from one point of either curve to the next. Bjøntegaard fits a cubic through four points
    instead, which swings where points are many or noisy, and takes decibels where points lost
    stand here.

    References
    ----------
    Bjøntegaard: Calculation of average PSNR differences between RD-curves, ITU-T SG16 Q.6
    document VCEG-M33, 2001.
    """
    (losses, sizes), (their_losses, their_sizes) = _envelope(ours), _envelope(theirs)
    low, high = LOST
    for lowest, why in ((losses[0], NEVER_OURS), (their_losses[0], NEVER_THEIRS)):
        if lowest > high:
            return Difference(float("nan"), why)
    start = max(low, losses[0], their_losses[0])
    end = min(high, losses[-1], their_losses[-1])
    if end - start < SHARE * (high - low) - 1e-9:
        return Difference(float("nan"), APART)
    turns = np.union1d(losses, their_losses)
    at = np.concatenate([[start], turns[(turns > start) & (turns < end)], [end]])
    apart = np.interp(at, losses, sizes) - np.interp(at, their_losses, their_sizes)
    return Difference(float(100 * np.expm1(np.trapezoid(apart, at) / (end - start))))


def _envelope(files: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Points lost, ascending, and log bytes, descending, of the files that no other one beats."""
    ordered = files.assign(lost=points_lost(files)).sort_values(["file_bytes", "lost"])
    best_before = ordered["lost"].cummin().shift(fill_value=np.inf)
    kept = ordered[ordered["lost"] < best_before].iloc[::-1]
    return kept["lost"].to_numpy(float), np.log(kept["file_bytes"].to_numpy(float))


def bd_rates(table: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """BD-rate of pairs of recipes, the first compared with the second, seed by seed.

    ``table`` is of ``Study.sweep``; files of several knobs make a recipe's curve. Columns: dataset,
    model, seed, recipe, against, bd_rate (percent, negative where the recipe's files are smaller)
    and why (of what is not a number). Networks without one of the two recipes are left out.
    """
    pairs, rows = list(pairs), []
    for (dataset, model, seed), part in table.groupby([*NETWORK, "seed"], sort=False):
        curves = dict(list(part.groupby("recipe", sort=False)))
        for ours, theirs in pairs:
            if ours in curves and theirs in curves:
                found = bd_rate(curves[ours], curves[theirs])
                rows.append((dataset, model, seed, ours, theirs, *found))
    columns = [*NETWORK, "seed", "recipe", "against", "bd_rate", "why"]
    return pd.DataFrame(rows, columns=columns)


def bd_verdict(rates: pd.DataFrame, wanted: Callable[[float, float], bool] = operator.lt) -> str:
    """Decide whether files are smaller than others, from ``bd_rates`` of one pair over seeds.

    By the 95 % interval of the BD-rate, or a single seed's value (``judge``); ``wanted`` is
    ``operator.le`` where equal files are good enough. It fails where ours never come within the
    range; where the others never do, that seed is won and has no part in the mean. It is open where
    seeds disagree in this, or have too little in common.
    """
    reasons, numbers = set(rates["why"]), _numbers(rates)
    if NEVER_OURS in reasons:
        return FAILS
    if APART in reasons:
        return OPEN
    verdict = judge(numbers, 0, wanted) if len(numbers) else HOLDS
    return OPEN if verdict == FAILS and NEVER_THEIRS in reasons else verdict


def bd_text(rates: pd.DataFrame) -> str:
    """``bd_rates`` of one pair over seeds as a mean with its interval, such as ``-28.4 ± 5.5 %``.

    What is not a number is told beside it, with its reason and of how many seeds.
    """
    numbers, counts = _numbers(rates), rates["why"].value_counts(sort=False)
    said = [text(numbers, 1, " %")] if len(numbers) else []
    for why, count in counts.drop("", errors="ignore").items():
        said.append(why if count == len(rates) else f"{why} ({count} of {len(rates)} seeds)")
    return ", ".join(said)


def _numbers(rates: pd.DataFrame) -> pd.Series:
    return rates.loc[rates["why"] == "", "bd_rate"]


def bd_table(rates: pd.DataFrame) -> pd.DataFrame:
    """``bd_rates`` averaged over seeds, as texts with intervals; a column for each network."""
    rates = rates.assign(network=rates["dataset"] + "-" + rates["model"])
    keys = ["recipe", "against", "network"]
    said = {key: bd_text(part) for key, part in rates.groupby(keys, sort=False)}
    table = pd.Series(said, dtype=object).rename_axis(keys).unstack(fill_value="", sort=False)
    return table.rename_axis(columns=None).reset_index()
