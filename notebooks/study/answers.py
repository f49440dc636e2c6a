"""What notebooks say in words, filled from results: answers, links, claims by network."""

import re
from collections.abc import Iterable

import pandas as pd

from .names import readable
from .paths import ROOT
from .records import claims_in
from .verdicts import HOLDS, Claim


class Said:
    """A sentence with numbers in it: HTML in a notebook, where it is not compared as text.

    Parameters
    ----------
    text : str
        HTML.
    """

    def __init__(self, text: str):
        self.text = text

    def __repr__(self):
        return "a sentence filled from results"

    def _repr_html_(self):
        return f"<p>{self.text}</p>"


def answer(study, notebook: str) -> Said:
    """A notebook's answer in one sentence, from its claims as they were last saved.

    Parameters
    ----------
    study : Study
        Of the notebook; where it has no claims yet, the committed ones of its profile do.
    notebook : str
        Such as ``03-pruning``.

    Returns
    -------
    Said
    """
    for folder in (study.results, ROOT / "results" / study.name):
        path = folder / f"claims-{notebook}.json"
        if path.exists():
            return Said(f"<b>{ANSWERS[notebook](claims_in(path.read_text()))}</b>")
    return Said("Not known yet: run all cells, then this one again.")


def link(study, *names: str) -> Said:
    """Where all rows of tables are."""
    files = (f'<a href="../results/{study.name}/{n}.csv">{n}.csv</a>' for n in names)
    return Said(f"All rows: {', '.join(files)}")


def share_range(values: Iterable[float], of: str) -> Said:
    """The range of shares in percent, of what."""
    values = list(values)
    return Said(f"<b>{min(values):.0f} to {max(values):.0f} %</b> {of}")


def by_network(claims: list[Claim]) -> pd.DataFrame:
    """Verdicts and measurements: a row for each claim, a column for each network."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for claim in claims:
        said = claim.ours.split(" (")[0]
        cells = rows.setdefault((claim.id, claim.claim), {"expected": claim.expected})
        cells[_where(claim.where)] = f"{claim.verdict}: {said}"
    return pd.DataFrame([{"": i, "claim": c} | cells for (i, c), cells in rows.items()]).fillna("")


def _where(where: str) -> str:
    """Of ``cifar10-jpeg-resnet20``: ResNet-20 on CIFAR-10 (JPEG)."""
    dataset, _, model = re.sub(r"-s\d+$", "", where).rpartition("-")
    return f"{readable(model)} on {readable(dataset)}"


def _quickstart(rows: list[dict]) -> str:
    found = {row["id"]: row["ours"] for row in rows}
    lost = float(found["Q2"])
    loses = f"loses {lost:.2f} points of test accuracy" if lost > 0 else "loses no test accuracy"
    return (
        f"{_where(rows[0]['where'])}: the file is {found['Q1']} times smaller than the float32 "
        f"weights, {loses}, and what is loaded from it is {found['Q3']}, bit for bit, to what was "
        "measured."
    )


def _relevance(rows: list[dict]) -> str:
    found = {row["id"]: row["ours"] for row in rows}
    return (
        f"As much as weight × gradient says, if the rule is ε. {_where(rows[0]['where'])}: "
        f"relevance leaks at most {found['R1']} of itself on its way, the heatmaps differ from "
        f"zennit's by {found['R2']} at most, and 20 images of each class rank the weights like "
        f"many more do (rank correlation {found['R3']})."
    )


def _lost(rows: list[dict], reading: str) -> str:
    """Points lost in a reading, over networks: ``83.06 to 88.61``."""
    lost = [float(re.search(r"(-?\d+\.\d+)[^,]*points lost", row["ours"])[1])
            for row in rows if row["id"] == "C4" and f"({reading}" in row["claim"]]  # fmt: skip
    return f"{min(lost):.1f} to {max(lost):.1f}" if lost else "?"


def _pruning(rows: list[dict]) -> str:
    return (
        f"Not as the sentence stands: all at once they cost {_lost(rows, 'literal, no training')} "
        f"points of accuracy. Half of them, nearest zero first and with the rest refitted, cost "
        f"{_lost(rows, 'the half nearest zero')}; all of them in four such rounds "
        f"{_lost(rows, 'four rounds')}."
    )


def _precision(rows: list[dict]) -> str:
    def held(reading: str) -> str:
        found = [row["verdict"] == HOLDS for row in rows if row["claim"].endswith(f"({reading})")]
        return f"on {sum(found)} of {len(found)} networks"

    return (
        "The smallest file within one point is smaller than every control's "
        f"{held('rate-distortion by relevance')} if relevance weighs the rounding errors of "
        f"units, and {held('tiers by |relevance|')} if it ranks weights into tiers of bits."
    )


ANSWERS = {
    "00-quickstart": _quickstart,
    "02-relevance": _relevance,
    "03-pruning": _pruning,
    "04-mixed-precision": _precision,
}
"""By notebook: from the rows of its claims to a sentence."""
