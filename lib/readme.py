"""The README's tables, written from ``results/`` so that no number in it is typed by hand."""

import re
from pathlib import Path

import pandas as pd

from lib.claims import NETWORK, overview, text
from lib.runs import ROOT, cost, read_claims, write

README = ROOT / "README.md"


def claims_table(results: Path) -> str:
    """All claims of a profile as a Markdown table, a column for each network.

    A row is a claim of ``claims-*.json`` in one reading; what was measured stands in bold where
    the claim does not hold. Claims about networks from elsewhere name them beside the sentence.
    """
    claims = read_claims(results)
    networks = list(dict.fromkeys(c["where"] for c in claims if c["id"] == "B1"))
    rows: dict[tuple[str, str, str], dict[str, dict]] = {}
    for claim in claims:
        network = re.sub(r"-s\d+$", "", claim["where"])
        elsewhere = "" if network in networks else f" ({network})"
        key = (claim["id"], claim["claim"] + elsewhere, f"`{claim['notebook'][:2]}`")
        cells = rows.setdefault(key, {})
        column = networks[0] if elsewhere else network
        if column in cells:
            raise ValueError(f"two results of {key} for {column}")
        cells[column] = claim
    head = ["", "claim", "expected", *networks, "notebook"]
    lines = [head, ["-"] * len(head)]
    for (identifier, sentence, notebook), found in rows.items():
        goals = list(dict.fromkeys(claim["paper"] for claim in found.values()))
        cells = [_result(found.get(network), len(goals) > 1) for network in networks]
        lines.append([identifier, sentence, goals[0] if len(goals) == 1 else "", *cells, notebook])
    return _markdown(lines)


def verdicts_table(results: Path) -> str:
    """How many readings of each claim hold, as a Markdown table with a column for each network."""
    table = overview(pd.DataFrame(read_claims(results)))
    head = ["", *table.columns[1:]]
    return _markdown([head, ["-"] * len(head), *table.to_numpy().tolist()])


def _result(claim: dict | None, with_goal: bool) -> str:
    """What was measured, bold where the claim does not hold; its goal where goals differ."""
    if claim is None:
        return ""
    said = claim["ours"] if claim["holds"] else f"**{claim['ours']}**"
    return f"{said} (expected: {claim['paper']})" if with_goal else said


def files_table(results: Path) -> str:
    """The smallest file of each recipe within one point, from ``headline-smallest.csv``."""
    table = pd.read_csv(results / "headline-smallest.csv")
    recipes = list(dict.fromkeys(table["recipe"]))
    columns = {"": ["uncompressed", *recipes]}
    for (dataset, model), part in table.groupby(NETWORK, sort=False):
        floats = (part["ratio"] * part["file_bytes"]).mean() / 1000
        seeds = part["seed"].nunique()
        column = columns[f"{dataset}-{model}, {seeds} seed{'s' if seeds > 1 else ''}"] = []
        base = text(part.groupby("seed")["base_test_accuracy"].first(), 2, " %")
        column.append(f"{floats:,.0f} kB, {base}")
        for recipe in recipes:
            rows = part[part["recipe"] == recipe]
            if rows.empty:
                column.append("–")
                continue
            size = f"{text(rows['file_bytes'] / 1000)} kB ({rows['ratio'].mean():.1f}x)"
            mark = "" if rows["reached"].all() else " †"
            column.append(f"{size}, {text(rows['test_accuracy'], 2, ' %')}{mark}")
    lines = [list(columns), ["-"] * len(columns), *zip(*columns.values(), strict=True)]
    return _markdown(lines)


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(content: str) -> str:
    return content.replace("|", "\\|")


def latency_table(results: Path) -> str:
    """Latency of the ONNX files as a Markdown table, from ``bench/export.csv``."""
    lines = ["| network | batch | float ONNX (ms) | int8 ONNX (ms) | float / int8 |", "|-|-|-|-|-|"]
    for row in pd.read_csv(results / "export.csv").to_dict("records"):
        times = f"{row['float ONNX ms']:.2f} | {row['int8 ONNX ms']:.2f}"
        lines.append(f"| {row['model']} | {row['batch']} | {times} | {row['float / int8']:.1f} |")
    return "\n".join(lines)


def speed_table(results: Path) -> str:
    """Time and memory of weight relevance as a Markdown table, from ``bench/relevance.csv``."""
    head = "network | relevance | time / training step | to reach | peak MiB, 50 and 400 images"
    lines = [f"| {head} (allowed) |", "|-|-|-|-|-|"]
    for row in pd.read_csv(results / "relevance.csv").to_dict("records"):
        memory = f"{row['peak MiB']:.0f}, {row['peak MiB, 8 x images']:.0f}"
        allowed = f"({row['training peak + weights MiB']:.0f})"
        lines.append(
            f"| {row['model']} | {row['method']} | {row['ratio']:.2f} | {row['target']} "
            f"| {memory} {allowed} |"
        )
    return "\n".join(lines)


def cost_table(results: Path) -> str:
    """What the runs took as a Markdown table, from their records."""
    head = ["network", "seeds", "runs", "core hours", "processor"]
    lines = [head, ["-"] * len(head)]
    for row in cost(results / "runs").to_dict("records"):
        counts = [str(row["seeds"]), str(row["runs"]), f"{row['core hours']:.1f}"]
        lines.append([f"{row['dataset']}-{row['model']}", *counts, row["processor"]])
    return _markdown(lines)


def filled(text: str, root: Path = ROOT) -> str:
    """The README's text with every block between markers written anew.

    Parameters
    ----------
    text : str
        Holds ``<!-- claims: PROFILE -->``, ``<!-- verdicts: PROFILE -->``,
        ``<!-- files: PROFILE -->``, ``<!-- cost: PROFILE -->``, ``<!-- latency: bench -->`` or
        ``<!-- speed: bench -->``, then ``<!-- end -->``.
    root : Path
        Folder of ``results/``.

    Returns
    -------
    str
    """

    tables = {
        "claims": claims_table,
        "verdicts": verdicts_table,
        "files": files_table,
        "cost": cost_table,
        "latency": latency_table,
        "speed": speed_table,
    }

    def block(match: re.Match) -> str:
        what = match["what"]
        table = tables[match["kind"]](root / "results" / what)
        return f"<!-- {match['kind']}: {what} -->\n\n{table}\n\n<!-- end -->"

    pattern = rf"<!-- (?P<kind>{'|'.join(tables)}): (?P<what>\w+) -->.*?<!-- end -->"
    return re.sub(pattern, block, text, flags=re.S)


def update() -> None:
    """Fill the README in place."""
    write(README, filled(README.read_text()))
