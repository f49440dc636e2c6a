"""From tables of runs to verdicts: operating points, intervals, and one sentence each."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

NETWORK = ["dataset", "model"]
TITLES = {
    "B1": "the base network is as accurate as it is known to be",
    "C1": "the file is 64 % smaller than the XAI baseline's",
    "C2": "the network is 42 % more accurate than the XAI baseline's",
    "C3": "at most one point is lost against the uncompressed network",
    "C4": "weights with score <= 0 can go",
    "C4s": "it is the sign of the score that finds them",
    "C5": "more bits for higher scores make the smallest file",
    "C6": "relevance needs no larger file than any other criterion",
    "A1": "each ingredient of the reading that works is needed",
}
"""What the claims about every network are about, in all their readings."""


@dataclass(frozen=True)
class Claim:
    """One sentence that is tested.

    Attributes
    ----------
    id : str
        Such as ``C1``.
    claim : str
        The sentence, with the reading it is tested in.
    where : str
        Data set and network.
    paper : str
        What the paper says, or what was expected.
    ours : str
        What was measured, with its 95 % interval where there are several seeds.
    holds : bool
        The verdict.
    """

    id: str
    claim: str
    where: str
    paper: str
    ours: str
    holds: bool


def interval(values: Iterable[float]) -> float:
    """Half width of the 95 % interval of a mean (Student's t); NaN for a single value."""
    values = np.asarray(list(values), dtype=float)
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def text(values: Iterable[float], digits: int = 1, unit: str = "") -> str:
    """A mean with its interval, such as ``12.3 ± 0.4 %``."""
    values = list(values)
    half = interval(values)
    spread = "" if np.isnan(half) else f" ± {half:.{digits}f}"
    return f"{np.mean(values):.{digits}f}{spread}{unit}"


def summarise(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Means over seeds, with the interval of the test accuracy.

    Parameters
    ----------
    table : DataFrame
        Of ``Study.sweep``.
    by : list of str
        Columns that make one row.

    Returns
    -------
    DataFrame
        ``by``, kept (%), file bytes, ratio, validation and test accuracy and points lost (%).
    """
    lost = table["base_test_accuracy"] - table["test_accuracy"]
    groups = table.assign(lost=lost).groupby(by, sort=False)
    return pd.DataFrame(
        {
            "seeds": groups["seed"].nunique(),
            "kept (%)": 100 * groups["density"].mean(),
            "file bytes": groups["file_bytes"].mean(),
            "ratio": groups["ratio"].mean(),
            "val accuracy": groups["val_accuracy"].mean(),
            "test accuracy": groups["test_accuracy"].mean(),
            "±": groups["test_accuracy"].agg(interval),
            "points lost": groups["lost"].mean(),
        }
    ).reset_index()


def smallest_files(tables: Iterable[pd.DataFrame], max_drop: float) -> pd.DataFrame:
    """The smallest file of each recipe that loses little on the validation split.

    Parameters
    ----------
    tables : iterable of DataFrame
        Of ``Study.sweep``.
    max_drop : float
        Points of validation accuracy that may be lost against the base network.

    Returns
    -------
    DataFrame
        A row for each dataset, model, seed and recipe; ``reached`` is False, and the most accurate
        file stands in, where every file loses more.
    """
    table = pd.concat(tables).drop_duplicates([*NETWORK, "seed", "recipe", "knob"])
    drop = table["base_val_accuracy"] - table["val_accuracy"]
    table = table.assign(reached=drop <= max_drop + 1e-9)
    chosen = [
        part[part["reached"]].nsmallest(1, "file_bytes")
        if part["reached"].any()
        else part.nlargest(1, "val_accuracy")
        for _, part in table.groupby([*NETWORK, "seed", "recipe"], sort=False)
    ]
    return pd.concat(chosen).reset_index(drop=True)


def operating_points(best: pd.DataFrame) -> pd.DataFrame:
    """Average ``smallest_files`` over seeds, for a table.

    Parameters
    ----------
    best : DataFrame
        Of ``smallest_files``.

    Returns
    -------
    DataFrame
        As ``summarise``, with the share of seeds that reached the accuracy.
    """
    keys = [*NETWORK, "recipe"]
    reached = best.groupby(keys, sort=False)["reached"].mean().map("{:.0%}".format)
    return summarise(best, keys).merge(reached.reset_index(), on=keys, validate="one_to_one")


def overview(claims: pd.DataFrame) -> pd.DataFrame:
    """Count verdicts: a row for each of ``TITLES``, a column for each network.

    Parameters
    ----------
    claims : DataFrame
        With columns id, where and holds; a row for each reading.

    Returns
    -------
    DataFrame
        id, claim, and under each network's name ``n of m``: so many of its readings hold; empty
        where a network was not asked.
    """
    claims = claims[claims["id"].isin(TITLES)].replace({"where": {r"-s\d+$": ""}}, regex=True)
    counts = claims.groupby(["id", "where"], sort=False)["holds"].agg(["sum", "size"])
    said = counts["sum"].astype(str) + " of " + counts["size"].astype(str)
    order = [identifier for identifier in TITLES if identifier in set(claims["id"])]
    table = said.unstack(fill_value="").loc[order, claims["where"].unique()]
    table.insert(0, "claim", [TITLES[identifier] for identifier in order])
    return table.rename_axis(columns=None).reset_index()


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
                bool(lost.mean() <= 1),
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
            said = text(worse, 2, " points worse")
            where, holds = f"{dataset}-{model}", bool(worse.mean() >= 1)
            claims.append(Claim(identifier, sentence, where, expected, said, holds))
    return claims


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
        mine, smaller, said = sizes[ours], True, []
        for name in others:
            theirs = sizes[name]
            if not theirs["reached"].all():
                said.append(f"{name}: never")
                continue
            smaller &= mine["file_bytes"].mean() < theirs["file_bytes"].mean()
            said.append(f"{name}: {text(theirs['file_bytes'] / 1000)} kB")
        reached = bool(mine["reached"].all())
        size = f"{text(mine['file_bytes'] / 1000)} kB" if reached else "never"
        claims.append(
            Claim(
                "C5",
                f"more bits for higher scores make the smallest file within 1 point ({way})",
                f"{dataset}-{model}",
                "smaller than every control",
                f"{size} ({'; '.join(said)})",
                reached and bool(smaller),
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
            smaller = mine["file_bytes"].mean() <= theirs["file_bytes"].mean()
            claims.append(
                Claim(
                    "C6",
                    f"{what} needs no larger file than {name.removeprefix('units by ')}",
                    f"{dataset}-{model}",
                    "no larger within 1 point",
                    f"{text(mine['file_bytes'] / 1000)} kB; "
                    f"{text(theirs['file_bytes'] / 1000)} kB{never}",
                    bool(mine["reached"].all() and (smaller or never)),
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
        where = f"{dataset}-{model}"
        claims += [
            Claim(
                "C1",
                f"file smaller than the XAI baseline's, both within 1 point ({label})",
                where,
                "64 %",
                text(within, 1, " %"),
                bool(np.mean(within) >= 64),
            ),
            Claim(
                "C1",
                f"file smaller than the XAI baseline's at no lower accuracy ({label})",
                where,
                "64 %",
                text(smaller, 1, " %") + ("" if all(reached) else " (accuracy not reached)"),
                bool(all(reached) and np.mean(smaller) >= 64),
            ),
            Claim(
                "C2",
                "more accurate than the XAI baseline in a file no larger, or its smallest "
                f"({label})",
                where,
                "42 %",
                f"{text(relative, 1, ' % relative')}, {text(points, 1, ' points')}",
                bool(np.mean(relative) >= 42),
            ),
            Claim(
                "C3",
                f"negligible loss against the uncompressed network ({label})",
                where,
                "<= 1.0 point",
                text(lost, 2, " points lost"),
                bool(np.mean(lost) <= 1),
            ),
        ]
    return claims


def _smallest(part: pd.DataFrame, floor: float) -> pd.Series:
    """The smallest file at least as accurate as the floor on validation, else the best."""
    good = part[part["val_accuracy"] >= floor]
    chosen = good.nsmallest(1, "file_bytes") if len(good) else part.nlargest(1, "val_accuracy")
    return chosen.iloc[0]
