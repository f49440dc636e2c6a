"""Readings: from tables of runs, as of ``Study.sweep``, to claims about each network.

Choices are made on the validation split; the numbers are those of the test split. Each function
gives a claim for each network, and for each sentence where it is handed several.
"""

import operator
from collections.abc import Callable

import pandas as pd

from .bdrate import bd_rates, bd_text, bd_verdict
from .tables import each_network, points_lost, smallest, smallest_files, text
from .verdicts import Claim, all_of, judge


def seeds_of(part: pd.DataFrame) -> tuple[int, ...]:
    """Seeds of a table's rows, in their order."""
    return tuple(int(seed) for seed in part["seed"].unique())


def removal_claims(removal: pd.DataFrame, recipe: str, reading: str) -> list[Claim]:
    """C4: the share of weights that a recipe removes, and the points that it loses.

    ``reading`` says in words what the recipe does. The claim holds where at most one point of test
    accuracy is lost.
    """
    sentence, goal = f"weights with score <= 0 can go ({reading})", "negligible loss (<= 1.0 point)"
    claims = []
    for where, part in each_network(removal[removal["recipe"] == recipe]):
        lost, share = points_lost(part), 100 * (1 - part["density"])
        said = f"{text(share, 0, ' % removed')}, {text(lost, 2, ' points lost')}"
        verdict = judge(lost, 1, operator.le)
        claims.append(Claim("C4", sentence, where, goal, said, verdict, seeds_of(part)))
    return claims


def worse_claims(
    table: pd.DataFrame, identifier: str, expected: str, ours: str, rivals: dict[str, str]
) -> list[Claim]:
    """C4s and A1: a recipe is at least a point of test accuracy better than its rivals.

    ``rivals`` names, by the sentence that is claimed, the recipe that is to be worse.
    """
    claims = []
    for where, part in each_network(table):
        by_seed = part.pivot(index="seed", columns="recipe", values="test_accuracy")
        for sentence, rival in rivals.items():
            worse = by_seed[ours] - by_seed[rival]
            said, seeds = text(worse, 2, " points worse"), seeds_of(part)
            claims.append(
                Claim(identifier, sentence, where, expected, said, judge(worse, 1), seeds)
            )
    return claims


def precision_claims(table: pd.DataFrame, ours: str, others: list[str], way: str) -> list[Claim]:
    """C5: at equal accuracy, the recipe that allocates by score needs a smaller file than controls.

    ``way`` says in words how it allocates. Networks without ours are left out; the others are
    decided by BD-rate against those controls that they have, all settings of the knobs together.
    """
    sentence = f"more bits for higher scores make the smallest file ({way})"
    claims = []
    for where, part in each_network(table):
        sizes = _sizes(part)
        rivals = [name for name in others if name in sizes]
        if ours not in sizes or not rivals:
            continue
        found = {name: bd_rates(part, [(ours, name)]) for name in rivals}
        against = [f"{name} {bd_text(rates)} ({sizes[name]})" for name, rates in found.items()]
        said = f"{sizes[ours]} within 1 point; against " + "; ".join(against)
        verdict = all_of(map(bd_verdict, found.values()))
        goal, seeds = "BD-rate < 0 % against each control", seeds_of(part[part["recipe"] == ours])
        claims.append(Claim("C5", sentence, where, goal, said, verdict, seeds))
    return claims


def size_claims(
    table: pd.DataFrame,
    identifier: str,
    pairs: dict[str, tuple[str, str]],
    wanted: Callable[[float, float], bool] = operator.le,
) -> list[Claim]:
    """C6, C7, L1: one recipe's files against another's at equal accuracy, decided by BD-rate.

    ``pairs`` names, by sentence, the recipe that it is about and the other one; networks that lack
    one are left out. ``wanted`` is ``operator.le`` for no larger, ``operator.lt`` for smaller.
    """
    claims, goal = [], f"BD-rate {'<' if wanted is operator.lt else '<='} 0 %"
    for where, part in each_network(table):
        sizes = _sizes(part)
        for sentence, pair in pairs.items():
            rates = bd_rates(part, [pair])
            if rates.empty:
                continue
            size, other = (sizes[name] for name in pair)
            said = f"{bd_text(rates)}; within 1 point {size}, the other {other}"
            verdict, seeds = bd_verdict(rates, wanted), seeds_of(rates)  # those that both have
            claims.append(Claim(identifier, sentence, where, goal, said, verdict, seeds))
    return claims


def _sizes(table: pd.DataFrame) -> dict[str, str]:
    """Of each recipe the smallest file within one point of validation accuracy, in words."""
    best = smallest_files([table], max_drop=1.0)
    return {
        name: f"{text(rows['file_bytes'] / 1000)} kB" if rows["reached"].all() else "never"
        for name, rows in best.groupby("recipe", sort=False)
    }


def headline(
    table: pd.DataFrame, ours: list[str], theirs: list[str], label: str, max_drop: float = 1.0,
    loss: bool = True,
) -> list[Claim]:  # fmt: skip
    """C1 (twice), C2 and C3: the comparison with the XAI baseline.

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
    loss : bool
        Whether C3 is asked: it does not depend on the other side.
    """
    smaller = "file smaller than the XAI baseline's"
    claims = []
    for where, network in each_network(table):
        parts = [part for _, part in network.groupby("seed")]
        found = pd.DataFrame([_compared(part, ours, theirs, max_drop) for part in parts])
        seeds = seeds_of(network)
        within, matched, lost = found["within"], found["matched"], found["lost"]
        near, beside, level = (all(found[name]) for name in ("near", "theirs near", "reached"))
        missed = " (accuracy not reached)"
        unlike = missed * (not near) + " (not reached by the baseline)" * (not beside)
        relative = text(found["relative"], 1, " % relative")
        rows = [
            ("C1", f"{smaller}, both within {max_drop:g} point ({label})", "64 %",
             text(within, 1, " %") + unlike, judge(within, 64, also=near)),
            ("C1", f"{smaller} at no lower accuracy ({label})", "64 %",
             text(matched, 1, " %") + missed * (not level), judge(matched, 64, also=level)),
            ("C2", "more accurate than the XAI baseline in a file no larger, or its smallest "
             f"({label})", "42 %",
             f"{relative}, {text(found['points'], 1, ' points')}", judge(found["relative"], 42)),
            ("C3", f"negligible loss against the uncompressed network ({label})", "<= 1.0 point",
             text(lost, 2, " points lost"), judge(lost, 1, operator.le)),
        ]  # fmt: skip
        asked = rows if loss else rows[:-1]
        claims += [Claim(i, claim, where, *result, seeds) for i, claim, *result in asked]
    return claims


def _compared(part: pd.DataFrame, ours: list[str], theirs: list[str], max_drop: float) -> dict:
    """Both sides of one network: by how many percent our files are smaller, and more accurate."""
    floor = part["base_val_accuracy"].iloc[0] - max_drop - 1e-9
    mine, other = (part[part["recipe"].isin(side)] for side in (ours, theirs))
    best, their_best = _smallest(mine, floor), _smallest(other, floor)
    match = _smallest(mine, their_best["val_accuracy"])
    no_larger = other[other["file_bytes"] <= best["file_bytes"]]
    rival = (
        no_larger.nlargest(1, "val_accuracy").iloc[0]
        if len(no_larger)
        else other.nsmallest(1, "file_bytes").iloc[0]
    )
    points = best["test_accuracy"] - rival["test_accuracy"]
    return {
        "within": 100 * (1 - best["file_bytes"] / their_best["file_bytes"]),
        "matched": 100 * (1 - match["file_bytes"] / their_best["file_bytes"]),
        "near": best["val_accuracy"] >= floor,
        "theirs near": their_best["val_accuracy"] >= floor,
        "reached": match["val_accuracy"] >= their_best["val_accuracy"],
        "points": points,
        "relative": 100 * points / rival["test_accuracy"],
        "lost": points_lost(best),
    }


def _smallest(part: pd.DataFrame, floor: float) -> pd.Series:
    """The smallest file at least as accurate as the floor on validation, else the best."""
    return smallest(part, part["val_accuracy"] >= floor).iloc[0]
