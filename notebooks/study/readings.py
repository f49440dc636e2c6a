"""Readings: from tables of runs to claims about each network.

Tables are those of ``Study.sweep``. Choices are made on the validation split; the numbers are those
of the test split.
"""

import operator

import pandas as pd

from .tables import NETWORK, text
from .verdicts import FAILS, HOLDS, Claim, all_of, judge


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


def _spared(mine: pd.DataFrame, theirs: pd.DataFrame) -> pd.Series:
    """Bytes by which the first's files are smaller, seed by seed."""
    return (theirs.set_index("seed")["file_bytes"] - mine.set_index("seed")["file_bytes"]).dropna()


def precision_claims(best: pd.DataFrame, ours: str, others: list[str], way: str) -> list[Claim]:
    """C5: at equal accuracy, allocation by score needs a smaller file than its controls.

    Parameters
    ----------
    best : DataFrame
        Of ``smallest_files``.
    ours : str
        The recipe that allocates by score.
    others : list of str
        Its controls.
    way : str
        The way of allocating, in words.

    Returns
    -------
    list of Claim
        One for each network.
    """
    claims = []
    for (dataset, model), part in best.groupby(NETWORK, sort=False):
        sizes = {name: rows for name, rows in part.groupby("recipe", sort=False)}
        mine, found, said = sizes[ours], [], []
        reached = bool(mine["reached"].all())
        for name in others:
            theirs = sizes[name]
            if not theirs["reached"].all():
                said.append(f"{name}: never")
                continue
            found.append(judge(_spared(mine, theirs), 0, operator.gt))
            said.append(f"{name}: {text(theirs['file_bytes'] / 1000)} kB")
        size = f"{text(mine['file_bytes'] / 1000)} kB" if reached else "never"
        claims.append(
            Claim(
                "C5",
                f"more bits for higher scores make the smallest file within 1 point ({way})",
                f"{dataset}-{model}",
                "smaller than every control",
                f"{size} ({'; '.join(said)})",
                all_of(found) if reached else FAILS,
                seeds_of(mine),
            )
        )
    return claims


def criterion_claims(best: pd.DataFrame, ours: str, what: str) -> list[Claim]:
    """C6: relevance against each other criterion in the same pipeline.

    Parameters
    ----------
    best : DataFrame
        Of ``smallest_files``; every recipe but ``ours`` is a rival, unless it is another variant
        of relevance (``lrp`` in its name).
    ours : str
        The recipe that uses relevance.
    what : str
        What it uses, in words.

    Returns
    -------
    list of Claim
        One for each network and rival; it holds where ours is no larger within one point.
    """
    claims = []
    for (dataset, model), part in best.groupby(NETWORK, sort=False):
        mine = part[part["recipe"] == ours]
        for name, theirs in part.groupby("recipe", sort=False):
            if name == ours or "lrp" in name:
                continue
            never = "" if theirs["reached"].all() else " (not within 1 point)"
            verdict = HOLDS if never else judge(_spared(mine, theirs), 0)
            claims.append(
                Claim(
                    "C6",
                    f"{what} needs no larger file than {name.removeprefix('units by ')}",
                    f"{dataset}-{model}",
                    "no larger within 1 point",
                    f"{text(mine['file_bytes'] / 1000)} kB; "
                    f"{text(theirs['file_bytes'] / 1000)} kB{never}",
                    verdict if mine["reached"].all() else FAILS,
                    seeds_of(mine),
                )
            )
    return claims


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
                f"file smaller than the XAI baseline's, both within 1 point ({label})",
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
