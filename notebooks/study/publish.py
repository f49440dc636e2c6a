"""Tables in Markdown, written from ``results/`` so that no number in them is typed by hand."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pandas as pd

from .names import network, readable, spelled_out
from .paths import ROOT
from .profiles import PROFILES
from .records import cost, read_claims, write
from .tables import NETWORK, points_lost, text
from .verdicts import FAILS, HOLDS, OPEN, TITLES, held, key, overview

README, ARTIFACT = ROOT / "README.md", ROOT / "ARTIFACT.md"


def markdown(table: pd.DataFrame) -> str:
    """A table of texts as Markdown, without its index."""
    safe = table.astype(str).replace({r"\|": r"\\|"}, regex=True)
    padded = safe.to_markdown(index=False, tablefmt="pipe", disable_numparse=True)
    return re.sub(r"-{2,}", "-", re.sub(r" {2,}", " ", padded))  # for the eye of a renderer only


def claims_text(results: Path) -> str:
    """All claims of a profile, reading by reading: the content of its ``CLAIMS.md``."""
    claims = read_claims(results)
    counts = Counter(claim["verdict"] for claim in claims)
    return (
        f"# Claims, reading by reading: profile {results.name}\n\n"
        f"{len(claims)} readings of claims: {counts[HOLDS]} hold, {counts[OPEN]} are open, "
        f"{counts[FAILS]} fail. What fails stands in **bold**, what is open in *italics*: there "
        "the 95 % interval over seeds contains the threshold, and more seeds could decide either "
        "way, or curves have too few losses in common. A claim of one seed is decided by its "
        "value. Written from `claims-*.json` by `python -m study claims`.\n\n"
        + claims_table(claims, heads(results)) + "\n"
    )  # fmt: skip


def heads(results: Path) -> dict[str, str]:
    """Each network with what a reader has to know of it: one seed alone, a base of few bits."""
    path = results / "bases.csv"
    known = {}
    for (dataset, model), part in pd.read_csv(path).groupby(NETWORK) if path.exists() else []:
        one = ", 1 seed" if part["seed"].nunique() == 1 else ""
        known[f"{dataset}-{model}"] = f"{dataset}-{model}{one}{_stored(results, dataset, model)}"
    return known


def claims_table(claims: list[dict], called: Mapping[str, str] | None = None) -> str:
    """Claims as a Markdown table, a column for each network, called as ``heads`` has it.

    Claims about networks from elsewhere name them beside the sentence.
    """
    networks = list(dict.fromkeys(c["where"] for c in claims if c["id"] == "B1"))
    rows: dict[tuple[str, str, str], dict[str, dict]] = {}
    for claim in claims:
        where = re.sub(r"-s\d+$", "", claim["where"])
        elsewhere = "" if where in networks else f" ({where})"
        row = (claim["id"], claim["claim"] + elsewhere, f"`{claim['notebook'][:2]}`")
        cells, column = rows.setdefault(row, {}), networks[0] if elsewhere else where
        if column in cells:
            raise ValueError(f"two results of {row} for {column}")
        cells[column] = claim
    lines = []
    for (identifier, sentence, notebook), found in rows.items():
        goals = list(dict.fromkeys(claim["expected"] for claim in found.values()))
        cells = [_result(found.get(where), len(goals) > 1) for where in networks]
        goal = goals[0] if len(goals) == 1 else ""
        lines.append([identifier, spelled_out(sentence), goal, *cells, notebook])
    columns = [(called or {}).get(name, name) for name in networks]
    head = ["", "claim", "expected", *columns, "notebook"]
    return markdown(pd.DataFrame(lines, columns=head))


def _result(claim: dict | None, with_goal: bool) -> str:
    """What was measured, marked by its verdict; with its goal where goals differ."""
    if claim is None:
        return ""
    mark = {HOLDS: "", OPEN: "*"}.get(claim["verdict"], "**")
    said = f"{mark}{spelled_out(claim['ours'])}{mark}"
    return f"{said} (expected: {claim['expected']})" if with_goal else said


def write_claims(results: Path) -> None:
    """Write a profile's ``CLAIMS.md``."""
    write(results / "CLAIMS.md", claims_text(results))


def changed(claims: list[dict], committed: list[dict]) -> list[str]:
    """Claims whose verdict is not the committed one: with both, and what was measured for each."""
    before = {key(claim): claim for claim in committed}
    return [
        f"{now['id']} {now['where']}, {now['claim']}: "
        f"{then['verdict']} ({then['ours']}) -> {now['verdict']} ({now['ours']})"
        for now in claims
        if (then := before.get(key(now), now))["verdict"] != now["verdict"]
    ]


def closing(study, claims: list[dict], committed: list[dict]) -> str:
    """What a reviewer asks when a study has run, in at most twelve lines.

    Which of its claims hold, are open and fail; how many differ from the ``committed`` ones; where
    figures, tables and executed notebooks are; what was not run.
    """
    asked = Counter(claim["id"] for claim in claims)
    verdicts = pd.Series([claim["verdict"] for claim in claims], dtype=object)
    lines = [f"profile {study.name!r}: {held(verdicts)} claims hold"]
    for verdict in (HOLDS, OPEN, FAILS):
        found = Counter(claim["id"] for claim in claims if claim["verdict"] == verdict)
        counts = (f"{i} {found[i]} of {asked[i]}" for i in asked if found[i])
        lines.append(f"  {verdict}: {', '.join(counts) or 'none'}")
    if committed:
        known = {key(claim) for claim in committed}
        new = sum(key(claim) not in known for claim in claims)
        count = len(changed(claims, committed))
        said = f"{count} verdicts differ from the committed ones (git HEAD)"
        lines.append(said + ", listed above" * (count > 0) + f"; {new} claims are new" * (new > 0))
    places = {
        "each claim with what was measured": study.results / "CLAIMS.md",
        "figures": study.figures,
        "tables": study.results,
        "notebooks as they have just run": study.scratch / "notebooks",
    }
    lines += [f"{what}: {os.path.relpath(place)}" for what, place in places.items()]
    return "\n".join([*lines, f"not run: {'; '.join(_not_run(study, asked))}"])


def _not_run(study, asked: Iterable[str]) -> list[str]:
    """What a run of a profile leaves out, and how it can be had."""
    ran = {(case.dataset, case.model) for case in study.cases}
    wanted = {(d, m) for p in PROFILES.values() for d, models in p.networks.items() for m in models}
    missing = sorted(wanted - ran)
    left = []
    if missing:
        left.append(f"{', '.join(network(*pair) for pair in missing)} (another PROFILE)")
    for part, said in {"training": "in training", "more images": "from more images"}.items():
        if names := _idle(study, part):
            left.append(f"{', '.join(names)} {said} (hours without a GPU)")
    left += [f"{i}: {TITLES[i]}" for i in TITLES if i not in asked]
    return left or ["nothing"]


def _idle(study, part: str) -> list[str]:
    """Networks that go without a part of the study; their seeds, where others do not."""
    names = []
    for pair in dict.fromkeys((case.dataset, case.model) for case in study.cases):
        cases = [case for case in study.cases if (case.dataset, case.model) == pair]
        seeds = [str(case.seed) for case in cases if not study.profile.takes(part, case)]
        some = f" (seeds {', '.join(seeds)})" if len(seeds) < len(cases) else ""
        names += [network(*pair) + some] if seeds else []
    return names


def verdicts_table(results: Path) -> str:
    """How many readings of each claim hold, a column for each network."""
    table = overview(pd.DataFrame(read_claims(results)))
    return markdown(table.rename(columns={"id": ""} | heads(results)))


FILES = (
    "lrp root, sequential, more images", "lrp, sequential, more images",
    "fisher, sequential, more images", "alike, sequential, more images",
    "lrp root, sequential", "alike, sequential", "shuffled root, sequential",
    "lrp root", "paper's rule, literal", "lrp, pruned", "random", "reversed",
    "deeplift 100%", "deeplift 80%, refit", "magnitude 20%",
)  # fmt: skip
"""Recipes of the table of files in README, in its order; the others stand in ``results/``."""


def files_table(results: Path) -> str:
    """The smallest file of each of ``FILES`` within one point of validation accuracy.

    From ``headline-smallest.csv`` and, where it is there, ``sequential-smallest.csv``.
    """
    table = pd.read_csv(results / "headline-smallest.csv")
    if (path := results / "sequential-smallest.csv").exists():
        more = pd.read_csv(path)
        new = ~more["recipe"].isin(table["recipe"]) & (more["max_drop"] == 1)
        table = pd.concat([table, more[new]])
    recipes = [name for name in FILES if name in set(table["recipe"])]
    columns = {"": ["base network", *map(readable, recipes)]}
    for (dataset, model), part in table.groupby(NETWORK, sort=False):
        floats = (part["ratio"] * part["file_bytes"]).mean() / 1000
        seeds = part["seed"].nunique()
        base = text(part.groupby("seed")["base_test_accuracy"].first(), 2, " %")
        float32 = f"{floats:,.0f} kB as float32{_stored(results, dataset, model)}, {base}"
        told = {recipe: _file(rows, seeds) for recipe, rows in part.groupby("recipe")}
        column = [float32, *(told.get(recipe, "–") for recipe in recipes)]
        columns[f"{dataset}-{model}, {seeds} seed{'s' if seeds > 1 else ''}"] = column
    return markdown(pd.DataFrame(columns))


def _file(rows: pd.DataFrame, seeds: int) -> str:
    """Size and accuracy of a recipe's files, marked where more is lost, or some seed did not run.

    By a dagger where some seed loses more on validation, by a double one where the mean does so on
    test images only.
    """
    size = f"{text(rows['file_bytes'] / 1000)} kB ({rows['ratio'].mean():.1f}x)"
    on_test = " ‡" * bool(points_lost(rows).mean() > 1 + 1e-9)
    mark = on_test if rows["reached"].all() else " †"
    ran = sorted(rows["seed"].unique())
    some = f" (seed{'s' * (len(ran) > 1)} {', '.join(map(str, ran))})" if len(ran) < seeds else ""
    return f"{size}, {text(rows['test_accuracy'], 2, ' %')}{mark}{some}"


def _stored(results: Path, dataset: str, model: str) -> str:
    """That a base network is itself kept in few bits, and its size, from ``bases.csv``."""
    path = results / "bases.csv"
    for row in pd.read_csv(path).to_dict("records") if path.exists() else []:
        if (row["dataset"], row["model"]) == (dataset, model) and row.get("stored bits", 32) < 32:
            return f" (kept in {row['stored bits']} bits: {row['stored bytes'] / 1000:,.0f} kB)"
    return ""


def cost_table(results: Path) -> str:
    """What the runs took, from their records."""
    table = cost(results / "runs")
    table.insert(0, "network", table["dataset"] + "-" + table["model"])
    table["core hours"] = table["core hours"].map("{:.1f}".format)
    return markdown(table[["network", "seeds", "runs", "core hours", "processor"]])


def expected_table(results: Path) -> str:
    """By claim the notebook that tests it, and its verdicts in the quick profile and in this."""
    profiles = list(dict.fromkeys(["quick", results.name]))
    rows = [c | {"profile": p} for p in profiles for c in read_claims(results.parent / p)]
    claims = pd.DataFrame([row for row in rows if row["id"] in TITLES])
    groups = claims.groupby(["id", "notebook", "profile"], sort=False)["verdict"]
    said = groups.agg(
        lambda found: ", ".join(
            f"{count} {verdict.removesuffix('s')}"
            for verdict in (HOLDS, OPEN, FAILS)
            if (count := (found == verdict).sum())
        )
    )
    table = said.unstack(fill_value="", sort=False)[profiles].reset_index()
    table.insert(0, "claim", table["id"] + ": " + table.pop("id").map(TITLES))
    return markdown(table.assign(notebook="`" + table["notebook"] + "`"))


TABLES: dict[str, Callable[[Path], str]] = {
    "verdicts": verdicts_table,
    "files": files_table,
    "cost": cost_table,
    "expected": expected_table,
}
"""Of the README and the artifact appendix, by the word in their markers."""


def filled(text: str, root: Path = ROOT) -> str:
    """A text with every block between ``<!-- KIND: FOLDER -->`` and ``<!-- end -->`` written anew.

    KIND is a key of ``TABLES``, FOLDER one of ``results/`` in ``root``.
    """

    def block(match: re.Match) -> str:
        what = match["what"]
        table = TABLES[match["kind"]](root / "results" / what)
        return f"<!-- {match['kind']}: {what} -->\n\n{table}\n\n<!-- end -->"

    pattern = rf"<!-- (?P<kind>{'|'.join(TABLES)}): (?P<what>\w+) -->.*?<!-- end -->"
    return re.sub(pattern, block, text, flags=re.S)


def update() -> None:
    """Fill the README and the artifact appendix in place."""
    for path in (README, ARTIFACT):
        write(path, filled(path.read_text()))
