"""Verdicts: what a claim is, when a measurement decides it, and how many hold."""

import operator
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from .tables import interval

TITLES = {
    "B1": "the base network is as accurate as it is known to be",
    "C1": "the file is 64 % smaller than the XAI baseline's",
    "C2": "the network is 42 % more accurate than the XAI baseline's",
    "C3": "at most one point is lost against the uncompressed network",
    "C4": "weights with score <= 0 can go",
    "C4s": "it is the sign of the score that finds them",
    "C5": "more bits for higher scores make the smallest file",
    "C6": "relevance needs no larger file than any other criterion",
    "C7": "no file is larger than the standard coder's at equal accuracy",
    "L1": "coding layer after layer needs less than all at once",
    "A1": "each ingredient of the reading that works is needed",
}
"""What the claims about every network are about, in all their readings."""

HOLDS, OPEN, FAILS = "holds", "open", "fails"


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
    expected : str
        What the paper says, or what was expected.
    ours : str
        What was measured, with its 95 % interval where there are several seeds.
    verdict : str
        ``holds``, ``fails``, or ``open``: the interval over seeds contains the threshold, or curves
        have too little in common.
    seeds : tuple of int
        Of the networks that were measured.
    """

    id: str
    claim: str
    where: str
    expected: str
    ours: str
    verdict: str
    seeds: tuple[int, ...] = ()

    def row(self, notebook: str) -> dict:
        """As it is written: all attributes, holds (bool; an open claim does not) and notebook."""
        fields = asdict(self) | {"seeds": list(self.seeds)}
        return fields | {"holds": self.verdict == HOLDS, "notebook": notebook}


def judge(
    values: Iterable[float],
    threshold: float,
    wanted: Callable[[float, float], bool] = operator.ge,
    also: bool = True,
) -> str:
    """Decide whether a mean over seeds is on the wanted side of a threshold. The one place for it.

    Parameters
    ----------
    values : iterable of float
        One for each seed.
    threshold : float
        What they are compared with.
    wanted : callable
        (mean, threshold) -> bool, such as ``operator.ge``.
    also : bool
        What has to be true besides, whatever the values.

    Returns
    -------
    str
        ``open`` where the mean's 95 % interval (Student's t) contains the threshold; a single
        value is compared as it is.
    """
    mean, half = float(np.mean(list(values))), interval(values)
    if not also:
        return FAILS
    if half > 0 and abs(mean - threshold) <= half:
        return OPEN
    return HOLDS if wanted(mean, threshold) else FAILS


def all_of(verdicts: Iterable[str]) -> str:
    """The verdict on a claim that several comparisons have to support."""
    verdicts = set(verdicts)
    return FAILS if FAILS in verdicts else OPEN if OPEN in verdicts else HOLDS


def overview(claims: pd.DataFrame) -> pd.DataFrame:
    """Count verdicts: a row for each of ``TITLES``, a column for each network.

    Parameters
    ----------
    claims : DataFrame
        With columns id, where and verdict; a row for each reading.

    Returns
    -------
    DataFrame
        id, claim, and under each network's name ``n of m``: so many of its readings hold, and how
        many are open, if any; empty where a network was not asked.
    """
    claims = claims[claims["id"].isin(TITLES)].replace({"where": {r"-s\d+$": ""}}, regex=True)
    groups = claims.groupby(["id", "where"], sort=False)["verdict"]
    said = groups.agg(
        lambda found: (
            f"{(found == HOLDS).sum()} of {len(found)}"
            + (f", {(found == OPEN).sum()} open" if (found == OPEN).any() else "")
        )
    )
    order = [identifier for identifier in TITLES if identifier in set(claims["id"])]
    table = said.unstack(fill_value="").loc[order, claims["where"].unique()]
    table.insert(0, "claim", [TITLES[identifier] for identifier in order])
    return table.rename_axis(columns=None).reset_index()


def single(
    identifier: str, claim: str, where: object, expected: str, ours: str, good: bool, seed: int = 0
) -> Claim:
    """A claim about one measurement of one network."""
    verdict = HOLDS if good else FAILS
    return Claim(identifier, claim, str(where), expected, ours, verdict, (seed,))
