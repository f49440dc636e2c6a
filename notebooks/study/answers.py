"""What notebooks say in words, filled from results: answers, links, claims by network."""

import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from . import lessons
from .bdrate import bd_rates, bd_table
from .names import network, place
from .paths import ROOT
from .records import claims_in
from .verdicts import FAILS, HOLDS, OPEN, Claim


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
    """A notebook's answer in one sentence, from its claims or tables as they were last saved.

    Parameters
    ----------
    study : Study
        Of the notebook; where it has none yet, the committed ones of its profile do.
    notebook : str
        Such as ``03-pruning``.

    Returns
    -------
    Said
    """
    for folder in (study.results, ROOT / "results" / study.name):
        try:
            if notebook in FROM_TABLES:
                return Said(f"<b>{FROM_TABLES[notebook](folder)}</b>")
            rows = claims_in((folder / f"claims-{notebook}.json").read_text())
            return Said(f"<b>{ANSWERS[notebook](rows)}</b>")
        except FileNotFoundError:
            continue
    return Said("Not known yet: run all cells, then this one again.")


def link(study, *names: str) -> Said:
    """Where all rows of tables are: names of tables, or of other files with their suffix."""
    files = [name if "." in name else f"{name}.csv" for name in names]
    links = (f'<a href="../results/{study.name}/{file}">{file}</a>' for file in files)
    return Said(f"All rows: {', '.join(links)}")


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
        cells[place(claim.where)] = f"{claim.verdict}: {said}"
    return pd.DataFrame([{"": i, "claim": c} | cells for (i, c), cells in rows.items()]).fillna("")


def _train(rows: list[dict]) -> str:
    held = sum(row["verdict"] == HOLDS for row in rows)
    said = (f"{place(r['where'])} {r['ours']} % (known for {r['expected']} %)" for r in rows)
    return (
        f"{held} of {len(rows)} are for certain as accurate as they are known to be with plain "
        f"training. Test accuracy: {'; '.join(said)}."
    )


def _quickstart(rows: list[dict]) -> str:
    found = {row["id"]: row["ours"] for row in rows}
    return (
        f"{place(rows[0]['where'])}: the file is {found['Q1']} times smaller than the float32 "
        f"weights, {_loses(float(found['Q2']))}, and what is loaded from it is {found['Q3']}, bit "
        "for bit, to what was measured."
    )


def _loses(points: float) -> str:
    return f"loses {points:.2f} points of test accuracy" if points > 0 else "loses no test accuracy"


def _relevance(rows: list[dict]) -> str:
    found = {row["id"]: row["ours"] for row in rows}
    return (
        f"As much as weight × gradient says, if the rule is ε. {place(rows[0]['where'])}: "
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


def _beyond(folder: Path) -> str:
    root = "lrp root, sequential"
    pairs = [(root, "lrp root"), (root, "alike, sequential")]
    rates = bd_rates(pd.read_csv(folder / "sequential.csv"), pairs)
    told = bd_table(rates).set_index("against").drop(columns="recipe")

    def rate_by_network(against: str) -> str:
        return "; ".join(f"{place(where)} {said}" for where, said in told.loc[against].items())

    return (
        "BD-rate of coding layer after layer against all at once, units weighed by the root of "
        f"relevance: {rate_by_network('lrp root')}. Of the root of relevance against units "
        f"weighed alike, both layer after layer: {rate_by_network('alike, sequential')}."
    )


def _ingredients(rows: list[dict]) -> str:
    held: dict[str, list[bool]] = {}
    for row in rows:
        held.setdefault(row["claim"].partition(" needs ")[2], []).append(row["verdict"] == HOLDS)
    needed: dict[int, list[str]] = {}
    for what, found in held.items():
        needed.setdefault(sum(found), []).append(what)
    parts = [f"{count or 'none'}: {', '.join(needed[count])}" for count in sorted(needed)[::-1]]
    networks = len({row["where"] for row in rows})
    return f"Of {networks} networks, so many need it — {'; '.join(parts)}."


def _settings(folder: Path) -> str:
    turned = lessons.settings(folder)
    lost = lessons.by_value(turned)
    spread = (lost["most lost"] - lost["least lost"]).sort_values(ascending=False)
    told = [f"{name} {points:.1f}" for name, points in spread.items() if points >= 0.5]
    hardly = spread[spread < 0.5].index
    return (
        f"{network(*turned.iloc[0][['dataset', 'model']])}, points of accuracy between the best "
        f"and the worst value: {', '.join(told)}"
        + (f"; less than half a point: {', '.join(hardly)}." if len(hardly) else ".")
    )


def _yours(rows: list[dict]) -> str:
    found = {row["id"]: row["ours"] for row in rows}
    return (
        f"If it is a feed-forward classifier in torch, yes. {place(rows[0]['where'])}, from "
        f"torchvision: the file is {found['Y1']} times smaller than the float32 weights, "
        f"{_loses(float(found['Y3']))}, and what is loaded from it is {found['Y2']}, bit for bit, "
        "to what was saved."
    )


def _counted(rows: list[dict], identifier: str) -> str:
    """How many readings of a claim hold, network by network."""
    found: dict[str, list[bool]] = {}
    for row in rows:
        if row["id"] == identifier:
            found.setdefault(place(row["where"]), []).append(row["verdict"] == HOLDS)
    return ", ".join(f"{sum(held)} of {len(held)} on {where}" for where, held in found.items())


def _baseline(rows: list[dict]) -> str:
    return (
        f"How many readings hold: 64 % smaller, {_counted(rows, 'C1')}; 42 % more accurate, "
        f"{_counted(rows, 'C2')}; at most one point lost, {_counted(rows, 'C3')}."
    )


def whole(rows: Iterable[dict]) -> Said:
    """How many readings of all claims hold, and where the paper's do in every reading."""
    verdicts = [row["verdict"] for row in rows]
    kinds: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if row["id"] in PAPERS:
            kinds.setdefault((row["id"], row["where"]), set()).add(row["verdict"])

    def all_are(verdict: str) -> str:
        cells = [cell for cell, found in kinds.items() if found == {verdict}]
        said = [f"{name} on {place(where)}" for name, where in sorted(cells, key=lambda c: c[0])]
        return ", ".join(said) or "none"

    return Said(
        f"<b>In part. Of {len(verdicts)} readings of claims {verdicts.count(HOLDS)} hold, "
        f"{verdicts.count(OPEN)} are open and {verdicts.count(FAILS)} fail. Of the paper's own, "
        f"these hold in every reading: {all_are(HOLDS)}; these fail in every one: "
        f"{all_are(FAILS)}.</b>"
    )


PAPERS = ("C1", "C2", "C3", "C4", "C5")
"""The claims of the paper's abstract; the others are about how it can be."""
ANSWERS = {
    "00-quickstart": _quickstart,
    "01-train": _train,
    "02-relevance": _relevance,
    "03-pruning": _pruning,
    "04-mixed-precision": _precision,
    "05-xai-baseline": _baseline,
    "07-which-ingredient": _ingredients,
    "08-your-model": _yours,
}
"""By notebook: from the rows of its claims to a sentence."""

FROM_TABLES = {"06-beyond": _beyond, "07-which-settings": _settings}
"""By notebook without claims: from the folder of its tables to a sentence."""
