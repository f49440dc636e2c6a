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

    ``claim`` holds the reading it is tested in, ``where`` data set and network, ``expected`` what
    the paper says or what was expected, ``ours`` what was measured, with its 95 % interval where
    there are several seeds. ``verdict`` is ``holds``, ``fails``, or ``open``: the interval over
    ``seeds`` contains the threshold, or curves have too little in common.
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

    ``values`` are one for each seed; ``wanted`` takes their mean and the threshold, such as
    ``operator.ge``; ``also`` has to be true besides, whatever the values. The verdict is ``open``
    where the mean's 95 % interval (Student's t) contains the threshold; a single value is compared
    as it is.
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


def held(verdicts: pd.Series) -> str:
    """How many claims hold, such as ``3 of 5``."""
    return f"{(verdicts == HOLDS).sum()} of {len(verdicts)}"


def key(row: dict) -> tuple[str, ...]:
    """What a claim as it is written is told from others by."""
    return row["notebook"], row["id"], row["where"], row["claim"]


def overview(claims: pd.DataFrame) -> pd.DataFrame:
    """Count verdicts: a row for each of ``TITLES``, a column for each network.

    ``claims`` has a row for each reading, with id, where and verdict. A cell says ``n of m``: so
    many of its readings hold, and how many are open, if any; empty where a network was not asked.
    """
    claims = claims[claims["id"].isin(TITLES)].replace({"where": {r"-s\d+$": ""}}, regex=True)
    groups = claims.groupby(["id", "where"], sort=False)["verdict"]
    said = groups.agg(
        lambda found: (
            held(found) + (f", {(found == OPEN).sum()} open" if (found == OPEN).any() else "")
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
