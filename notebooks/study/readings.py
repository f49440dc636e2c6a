"""Readings: from tables of runs, as of ``Study.sweep``, to claims about each network.

Choices are made on the validation split; the numbers are those of the test split.
"""

import operator
from collections.abc import Callable

import pandas as pd

from .bdrate import bd_rates, bd_text, bd_verdict, differences
from .tables import NETWORK, smallest_files, text
from .verdicts import Claim, all_of, judge


def seeds_of(part: pd.DataFrame) -> tuple[int, ...]:
    """Seeds of a table's rows, in their order."""
    return tuple(int(seed) for seed in part["seed"].unique())


def removal_claims(removal: pd.DataFrame, recipe: str, reading: str) -> list[Claim]:
    """C4: the share of weights with score <= 0 and the accuracy after removing them.

    Parameters
    ----------
    removal : DataFrame
        Of ``Study.sweep``.
    recipe : str
        Name in the column ``recipe``.
    reading : str
        What the recipe does, in words.

    Returns
    -------
    list of Claim
        One for each network; it holds where at most one point of test accuracy is lost.
    """
    claims = []
    for (dataset, model), part in removal[removal["recipe"] == recipe].groupby(NETWORK, sort=False):
        lost = part["base_test_accuracy"] - part["test_accuracy"]
        removed = text(100 * (1 - part["density"]), 0, " % removed")
        claims.append(
            Claim(
                "C4",
                f"weights with score <= 0 can go ({reading})",
                f"{dataset}-{model}",
                "negligible loss (<= 1.0 point)",
                f"{removed}, {text(lost, 2, ' points lost')}",
                judge(lost, 1, operator.le),
                seeds_of(part),
            )
        )
    return claims


def sign_claims(removal: pd.DataFrame, ours: str, reversed_: str, reading: str) -> list[Claim]:
    """C4s: the sign of the score matters, so that removing the opposite half does more harm.

    Parameters
    ----------
    removal : DataFrame
        Of ``Study.sweep``.
    ours, reversed_ : str
        The recipe, and the same with reversed scores.
    reading : str
        What the recipe does, in words.

    Returns
    -------
    list of Claim
        One for each network; it holds where reversed scores lose at least one point more.
    """
    sentence = f"removing positive scores instead does more harm ({reading})"
    return _point_worse(removal, ours, {sentence: reversed_}, "C4s", ">= 1.0 point worse")


def ablation_claims(table: pd.DataFrame, full: str, without: dict[str, str]) -> list[Claim]:
    """A1: what a reading of the rule loses when one of its ingredients is left out.

    Parameters
    ----------
    table : DataFrame
        Of ``Study.sweep``.
    full : str
        The recipe with all ingredients.
    without : dict of str to str
        By ingredient, the recipe that lacks it.

    Returns
    -------
    list of Claim
        One for each network and ingredient; it holds where at least one point more is lost.
    """
    rivals = {f"the reading that works needs {what}": recipe for what, recipe in without.items()}
    return _point_worse(table, full, rivals, "A1", ">= 1.0 point worse without")


def _point_worse(
    table: pd.DataFrame, ours: str, rivals: dict[str, str], identifier: str, expected: str
) -> list[Claim]:
    """A claim for each network and sentence, that its rival is at least a point less accurate."""
    claims = []
    for (dataset, model), part in table.groupby(NETWORK, sort=False):
        by_seed = part.pivot(index="seed", columns="recipe", values="test_accuracy")
        for sentence, rival in rivals.items():
            worse = by_seed[ours] - by_seed[rival]
            said, where = text(worse, 2, " points worse"), f"{dataset}-{model}"
            verdict = judge(worse, 1)
            claims.append(
                Claim(identifier, sentence, where, expected, said, verdict, seeds_of(part))
            )
    return claims


def precision_claims(table: pd.DataFrame, ours: str, others: list[str], way: str) -> list[Claim]:
    """C5: at equal accuracy, allocation by score needs a smaller file than its controls.

    Parameters
    ----------
    table : DataFrame
        Of ``Study.sweep``, with all settings of the recipes' knobs.
    ours : str
        The recipe that allocates by score.
    others : list of str
        Its controls.
    way : str
        The way of allocating, in words.

    Returns
    -------
    list of Claim
        One for each network that has ours, decided by BD-rate against the controls that it has.
    """
    claims = []
    for (dataset, model), part in table.groupby(NETWORK, sort=False):
        sizes = _sizes(part)
        rivals = [name for name in others if name in sizes]
        if ours not in sizes or not rivals:
            continue
        found = {name: differences(bd_rates(part, [(ours, name)])) for name in rivals}
        said = [f"{name} {bd_text(each)} ({sizes[name]})" for name, each in found.items()]
        claims.append(
            Claim(
                "C5",
                f"more bits for higher scores make the smallest file ({way})",
                f"{dataset}-{model}",
                "BD-rate < 0 % against each control",
                f"{sizes[ours]} within 1 point; against " + "; ".join(said),
                all_of(bd_verdict(each) for each in found.values()),
                seeds_of(part[part["recipe"] == ours]),
            )
        )
    return claims


def size_claims(
    table: pd.DataFrame,
    identifier: str,
    pairs: dict[str, tuple[str, str]],
    wanted: Callable[[float, float], bool] = operator.le,
) -> list[Claim]:
    """C6, C7, L1: one recipe's files against another's at equal accuracy.

    Parameters
    ----------
    table : DataFrame
        Of ``Study.sweep``, with all settings of the recipes' knobs.
    identifier : str
        Such as ``C6``.
    pairs : dict of str to tuple of str
        By sentence the recipe that it is about and the other one; networks that lack one are
        left out.
    wanted : callable
        ``operator.le`` for no larger, ``operator.lt`` for smaller.

    Returns
    -------
    list of Claim
        One for each network and pair, decided by BD-rate.
    """
    claims, goal = [], "<" if wanted is operator.lt else "<="
    for (dataset, model), part in table.groupby(NETWORK, sort=False):
        sizes = _sizes(part)
        for sentence, pair in pairs.items():
            if found := differences(bd_rates(part, [pair])):
                size, other = (sizes[name] for name in pair)
                claims.append(
                    Claim(
                        identifier,
                        sentence,
                        f"{dataset}-{model}",
                        f"BD-rate {goal} 0 %",
                        f"{bd_text(found)}; within 1 point {size}, the other {other}",
                        bd_verdict(found, wanted),
                        seeds_of(part[part["recipe"] == pair[0]]),
                    )
                )
    return claims


def _sizes(table: pd.DataFrame) -> dict[str, str]:
    """Of each recipe the smallest file within one point of validation accuracy, in words."""
    best = smallest_files([table], max_drop=1.0)
    return {
        name: f"{text(rows['file_bytes'] / 1000)} kB" if rows["reached"].all() else "never"
        for name, rows in best.groupby("recipe", sort=False)
    }


def headline(
    table: pd.DataFrame, ours: list[str], theirs: list[str], label: str, max_drop: float = 1.0
) -> list[Claim]:
    """C1 to C3: the comparison with the XAI baseline, all choices made on the validation split.

    Parameters
    ----------
    table : DataFrame
        Of ``Study.sweep``, with the recipes of both sides and all their settings.
    ours, theirs : list of str
        Recipes of each side; a side may use any of its recipes and settings.
    label : str
        What is compared, in words.
    max_drop : float
        Points of validation accuracy that a side's operating point may lose.

    Returns
    -------
    list of Claim
        C1, C2 and C3 for each network.
    """
    claims = []
    for (dataset, model), network in table.groupby(NETWORK, sort=False):
        smaller, within, relative, points, lost, reached = [], [], [], [], [], []
        for _, part in network.groupby("seed"):
            floor = part["base_val_accuracy"].iloc[0] - max_drop - 1e-9
            mine = part[part["recipe"].isin(ours)]
            other = part[part["recipe"].isin(theirs)]
            their_best = _smallest(other, floor)
            match = _smallest(mine, their_best["val_accuracy"])
            my_best = _smallest(mine, floor)
            no_larger = other[other["file_bytes"] <= my_best["file_bytes"]]
            rival = (
                no_larger.nlargest(1, "val_accuracy").iloc[0]
                if len(no_larger)
                else other.nsmallest(1, "file_bytes").iloc[0]
            )
            reached.append(match["val_accuracy"] >= their_best["val_accuracy"])
            within.append(100 * (1 - my_best["file_bytes"] / their_best["file_bytes"]))
            smaller.append(100 * (1 - match["file_bytes"] / their_best["file_bytes"]))
            points.append(my_best["test_accuracy"] - rival["test_accuracy"])
            relative.append(100 * points[-1] / rival["test_accuracy"])
            lost.append(my_best["base_test_accuracy"] - my_best["test_accuracy"])
        where, seeds = f"{dataset}-{model}", seeds_of(network)
        claims += [
            Claim(
                "C1",
                f"file smaller than the XAI baseline's, both within {max_drop:g} point ({label})",
                where,
                "64 %",
                text(within, 1, " %"),
                judge(within, 64),
                seeds,
            ),
            Claim(
                "C1",
                f"file smaller than the XAI baseline's at no lower accuracy ({label})",
                where,
                "64 %",
                text(smaller, 1, " %") + ("" if all(reached) else " (accuracy not reached)"),
                judge(smaller, 64, also=all(reached)),
                seeds,
            ),
            Claim(
                "C2",
                "more accurate than the XAI baseline in a file no larger, or its smallest "
                f"({label})",
                where,
                "42 %",
                f"{text(relative, 1, ' % relative')}, {text(points, 1, ' points')}",
                judge(relative, 42),
                seeds,
            ),
            Claim(
                "C3",
                f"negligible loss against the uncompressed network ({label})",
                where,
                "<= 1.0 point",
                text(lost, 2, " points lost"),
                judge(lost, 1, operator.le),
                seeds,
            ),
        ]
    return claims


def _smallest(part: pd.DataFrame, floor: float) -> pd.Series:
    """The smallest file at least as accurate as the floor on validation, else the best."""
    good = part[part["val_accuracy"] >= floor]
    chosen = good.nsmallest(1, "file_bytes") if len(good) else part.nlargest(1, "val_accuracy")
    return chosen.iloc[0]
