"""What notebooks say in words, filled from results: answers, links, claims by network."""

import re
from collections.abc import Iterable

import pandas as pd

from .bdrate import APART, NEVER_OURS, NEVER_THEIRS
from .names import place, readable, spelled_out
from .paths import ROOT
from .records import read_json
from .sentences import ANSWERS, FROM_TABLES
from .tables import each_network, points_lost, text
from .verdicts import FAILS, HOLDS, OPEN, TITLES, Claim


class Said:
    """A sentence with numbers in it: HTML in a notebook, where it is not compared as text."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self):
        return "a sentence filled from results"

    def _repr_html_(self):
        return f"<p>{self.text}</p>"


def answer(study, notebook: str) -> Said:
    """A notebook's answer in one sentence, from its claims or tables as they were last saved.

    Where the study has none yet, the committed ones of its profile do.
    """
    for folder in (study.results, ROOT / "results" / study.name):
        path = folder / f"claims-{notebook}.json"
        try:
            if notebook in FROM_TABLES:
                said, rows = FROM_TABLES[notebook](folder), read_json(path) if path.exists() else []
            else:
                said = ANSWERS[notebook](pd.DataFrame(rows := read_json(path)))
            return Said(f"<b>{said}</b>{one_seed(rows)}")
        except FileNotFoundError:
            continue
    return Said("Not known yet: run all cells, then this one again.")


def one_seed(rows: Iterable[dict]) -> str:
    """What has to be said of verdicts that no interval stands behind; empty where there are none.

    ``rows`` are claims with at least id, where and seeds.
    """
    asked: dict[str, list[bool]] = {}
    for row in rows:
        if row["id"] in TITLES:
            asked.setdefault(row["where"], []).append(len(row["seeds"]) == 1)
    alone = [
        place(where) + f" ({sum(single)} of {len(single)} readings)" * (not all(single))
        for where, single in asked.items()
        if any(single)
    ]
    if not alone:
        return ""
    return (
        f" One seed, hence no interval: {', '.join(alone)}. There a verdict is about "
        "that one network; where a small difference decides, the next seed may decide otherwise."
    )


UNITS = {"B1": " %", "Q1": " times", "Q2": " points", "Y1": " times", "Y3": " points"}
"""By claim, of what is expected and measured; other claims say theirs."""


def link(study, *names: str) -> Said:
    """Where all rows of tables are: names of tables, or of other files with their suffix."""
    files = [name if "." in name else f"{name}.csv" for name in names]
    links = (f'<a href="../results/{study.name}/{file}">{file}</a>' for file in files)
    return Said(f"All rows: {', '.join(links)}")


def negative(removed: float, kept: float) -> Said:
    """How many percent of removed and of kept weights are negative."""
    return Said(
        f"Of the weights that the rule removes here <b>{removed:.0f} %</b> are negative, of those "
        f"that it keeps <b>{kept:.0f} %</b>."
    )


def in_the_same_room(files: pd.DataFrame) -> Said:
    """What recipes lose in files of the same size, from ``lessons.same_bytes``: by network."""
    said = []
    for where, part in each_network(files):
        lost = {
            readable(name).removeprefix("units: "): text(points_lost(rows), 1)
            + " in a larger file" * bool((rows["file_bytes"] > rows["room"]).any())
            for name, rows in part.groupby("recipe", sort=False)
        }
        room = text(part.groupby("seed")["room"].first() / 1000, 1, " kB")
        told = "; ".join(f"{name} {points}" for name, points in lost.items())
        said.append(f"{place(where)}, at most {room}: {told}.")
    return Said(f"<b>Points of test accuracy lost</b><br>{'<br>'.join(said)}")


def by_network(claims: list[Claim]) -> pd.DataFrame:
    """Verdicts and measurements: a row for each claim, a column for each network."""
    several = {claim.where for claim in claims if claim.id not in TITLES or len(claim.seeds) > 1}
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for claim in claims:
        unit = UNITS.get(claim.id, "")
        where = place(claim.where) + ("" if claim.where in several else ", one seed")
        cells = rows.setdefault((claim.id, claim.claim), {"expected": claim.expected + unit})
        cells[where] = f"{claim.verdict}: {measured(claim.ours)}{unit}"
    table = pd.DataFrame(
        [{"": i, "claim": spelled_out(c)} | cells for (i, c), cells in rows.items()]
    )
    return table.fillna("not asked")


def measured(ours: str) -> str:
    """What was measured, in the words of figures; of files that are compared without their sizes.

    Of ``9.1 kB within 1 point; against units by alike -34.0 % (19.3 kB)`` it is ``9.1 kB within 1
    point; against units: all alike (-34.0 %)``, and so on for each control.
    """
    mine, against, controls = ours.partition("; against ")
    if not against:
        return ours
    found = (re.fullmatch(rf"(.+?) ({_RATE}) \([^()]*\)", part) for part in controls.split("; "))
    said = (f"{readable(match[1])} ({match[2]})" for match in found)
    return f"{mine}; against {'; '.join(said)}"


_RATE = rf"-?\d.*%.*|(?:{NEVER_OURS}|{NEVER_THEIRS}|{APART}).*"
"""Of ``bdrate.bd_text``."""


def whole(rows: Iterable[dict]) -> Said:
    """How many readings of all claims hold, and where the paper's do in every reading."""
    claims = pd.DataFrame(rows := [*rows])
    counts = claims["verdict"].value_counts().reindex([HOLDS, OPEN, FAILS], fill_value=0)
    papers = claims[claims["id"].isin(PAPERS)].sort_values("id", kind="stable")
    cells = papers.groupby(["id", "where"], sort=False)["verdict"].agg(["nunique", "first"])

    def all_are(verdict: str) -> str:
        found = cells.index[(cells["nunique"] == 1) & (cells["first"] == verdict)]
        return ", ".join(f"{name} on {place(where)}" for name, where in found) or "none"

    return Said(
        f"<b>In part. Of {len(claims)} readings of claims {counts[HOLDS]} hold, {counts[OPEN]} are "
        f"open and {counts[FAILS]} fail. Of the paper's own, these hold in every reading: "
        f"{all_are(HOLDS)}; these fail in every one: {all_are(FAILS)}.</b>{one_seed(rows)}"
    )


PAPERS = ("C1", "C2", "C3", "C4", "C5")
"""The claims of the paper's abstract; the others are about how it can be."""
