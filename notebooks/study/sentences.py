"""Each notebook's answer in one sentence, filled from its claims or from its tables."""

from pathlib import Path

import pandas as pd

from . import lessons
from .bdrate import bd_rates, bd_table
from .claims import MORE
from .names import network, place
from .tables import NETWORK
from .verdicts import HOLDS, held


def _train(claims: pd.DataFrame) -> str:
    rows = claims.to_dict("records")
    said = (f"{place(r['where'])} {r['ours']} % (known for {r['expected']} %)" for r in rows)
    return (
        f"{held(claims['verdict'])} are for certain as accurate as they are known to be with plain "
        f"training. Test accuracy: {'; '.join(said)}."
    )


def _measured(claims: pd.DataFrame) -> tuple[str, pd.Series]:
    """The network that claims are about, and by their identifier what was measured."""
    return place(claims["where"].iloc[0]), claims.set_index("id")["ours"]


def _quickstart(claims: pd.DataFrame) -> str:
    where, found = _measured(claims)
    return f"{where}: {_file(found['Q1'], found['Q2'], found['Q3'])} measured."


def _yours(claims: pd.DataFrame) -> str:
    where, found = _measured(claims)
    said = f"{where}, from torchvision: {_file(found['Y1'], found['Y3'], found['Y2'])} saved."
    return f"If it is a feed-forward classifier in torch, yes. {said}"


def _file(ratio: str, lost: str, equal: str) -> str:
    loses = f"loses {float(lost):.2f} points of" if float(lost) > 0 else "loses no"
    return (
        f"the file is {ratio} times smaller than the float32 weights, {loses} test accuracy, and "
        f"what is loaded from it is {equal}, bit for bit, to what was"
    )


def _relevance(claims: pd.DataFrame) -> str:
    where, found = _measured(claims)
    signed, magnitudes = claims.loc[claims["id"] == "R3", "ours"]
    return (
        f"As much as weight × gradient says, if the rule is ε. {where}: relevance leaks at most "
        f"{found['R1']} of itself on its way, the heatmaps differ from zennit's by {found['R2']} "
        "at most, and 20 images of each class rank the weights like many more do, better by sums "
        f"of magnitudes (rank correlation {magnitudes}) than by signed ones ({signed})."
    )


def _pruning(claims: pd.DataFrame) -> str:
    removals = claims[claims["id"] == "C4"]

    def lost(reading: str) -> str:
        """Points lost in a reading, over networks: ``83.1 to 88.6``."""
        asked = removals[removals["claim"].str.contains(f"({reading}", regex=False)]
        found = asked["ours"].str.extract(r"(-?\d+\.\d+)[^,]*points lost")[0].astype(float)
        return f"{found.min():.1f} to {found.max():.1f}" if len(found) else "?"

    return (
        f"Not as the sentence stands: all at once they cost {lost('literal, no training')} "
        f"points of accuracy. Half of them, nearest zero first and with the rest refitted, cost "
        f"{lost('the half nearest zero')}; four such rounds, scored anew before each, cost "
        f"{lost('four rounds')}."
    )


def _precision(claims: pd.DataFrame) -> str:
    def smaller(reading: str) -> str:
        asked = claims[claims["claim"].str.endswith(f"({reading})")]
        return f"on {held(asked['verdict'])} networks"

    return (
        "At equal accuracy files are smaller than every control's (BD-rate below zero) "
        f"{smaller('rate-distortion by relevance')} if relevance weighs the rounding errors of "
        f"units, and {smaller('tiers by |relevance|')} if its magnitude ranks weights into tiers "
        "of bits."
    )


def _baseline(claims: pd.DataFrame) -> str:
    counts = claims.groupby(["id", "where"], sort=False)["verdict"].agg(held)

    def by_place(identifier: str) -> str:
        said = counts[identifier].items()
        return ", ".join(f"{count} on {place(where)}" for where, count in said)

    def told(identifier: str, sentence: str) -> str:
        """What was measured in one reading, by network."""
        found = claims[(claims["id"] == identifier) & (claims["claim"] == sentence)]
        said = zip(found["ours"].str.split(";").str[0], found["where"], strict=True)
        return ", ".join(f"{ours} on {place(where)}" for ours, where in said)

    return (
        "Our smallest file within one point is smaller than the baseline's by "
        f"{told('C1', SMALLER)}. BD-rate of relevance against squared gradients: "
        f"{told('C6', 'relevance needs no larger file than fisher')}; against units all alike: "
        f"{told('C6', 'relevance needs no larger file than alike')} (negative: smaller files). "
        f"How many readings hold: 64 % smaller, {by_place('C1')}; 42 % more accurate, "
        f"{by_place('C2')}; at most one point lost, {by_place('C3')}."
    )


def _ingredients(claims: pd.DataFrame) -> str:
    what = claims["claim"].str.partition(" needs ")[2]
    what = what.str.replace("epsilon", "ε").str.replace("z+", "z⁺")
    needed: dict[str, list[str]] = {}
    for ingredient, rows in claims.groupby(what, sort=False):
        where = ", ".join(place(row) for row in rows.loc[rows["verdict"] == HOLDS, "where"])
        needed.setdefault(where, []).append(ingredient)
    nowhere = needed.pop("", [])
    parts = [f"on {where}: {', '.join(said)}" for where, said in needed.items()]
    return (
        f"Needed, that is, a point more is lost without it — {'; '.join(parts) or 'nothing'}. "
        f"Needed for certain on no network: {', '.join(nowhere) or 'none of them'}."
    )


def _beyond(folder: Path) -> str:
    errors = pd.read_csv(folder / "drift.csv")
    before, after = (
        errors[errors["recipe"] == way].nlargest(1, "knob")["error"].item()
        for way in ("all layers at once", "layer after layer")
    )
    where = network(*errors.iloc[0][NETWORK])
    moved = f"Yes, in part: at the output of {where} the relative error falls"
    if after >= before:
        moved = f"No: at the output of {where} the relative error goes"
    root, table = "lrp root, sequential", pd.read_csv(folder / "sequential.csv")
    pairs = {
        "layer after layer against all at once": (root, "lrp root"),
        "against units weighed alike, both layer after layer": (root, "alike, sequential"),
        "from more images against few": (MORE["lrp root"], root),
    }
    told = []
    for what, pair in pairs.items():
        rates = bd_rates(table, [pair])
        known = rates[rates.groupby(NETWORK)["bd_rate"].transform("count") > 0]
        if known.empty:
            continue
        (row,) = bd_table(known).drop(columns=["recipe", "against"]).to_dict("records")
        rated = "; ".join(f"{place(at)} {said}" for at, said in row.items())
        told.append(f"{what[0].upper()}{what[1:]}: {rated}")
    sizes = (
        "What files need at equal accuracy (BD-rate, units weighed by the root of relevance). "
        f"{'. '.join(told)}."
        if told
        else "At equal accuracy its files cannot be compared: the curves have too few losses in "
        "common."
    )
    return f"{moved} from {before:.3f} to {after:.3f}. {sizes}"


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


SMALLER = "file smaller than the XAI baseline's, both within 1 point (neither trained)"
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
