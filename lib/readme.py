"""The README's tables, written from ``results/`` so that no number in it is typed by hand."""

import json
import re
from pathlib import Path

import pandas as pd

from lib.runs import ROOT, write

README = ROOT / "README.md"
KEYS = ("id", "claim", "where", "paper", "ours")


def claims_table(results: Path) -> str:
    """All claims of a profile as a Markdown table, from ``claims-*.json``."""
    lines = ["| | claim | network | expected | measured | holds | notebook |", "|-|-|-|-|-|-|-|"]
    for path in sorted(results.glob("claims-*.json")):
        for claim in json.loads(path.read_text()):
            mark = "yes" if claim["holds"] else "**no**"
            cells = [claim[key].replace("|", "\\|") for key in KEYS]
            lines.append(f"| {' | '.join(cells)} | {mark} | `{claim['notebook']}` |")
    return "\n".join(lines)


def latency_table(results: Path) -> str:
    """Latency of the ONNX files as a Markdown table, from ``bench/export.csv``."""
    lines = ["| network | batch | float ONNX (ms) | int8 ONNX (ms) | float / int8 |", "|-|-|-|-|-|"]
    for row in pd.read_csv(results / "bench" / "export.csv").to_dict("records"):
        times = f"{row['float ONNX ms']:.2f} | {row['int8 ONNX ms']:.2f}"
        lines.append(f"| {row['model']} | {row['batch']} | {times} | {row['float / int8']:.1f} |")
    return "\n".join(lines)


def speed_table(results: Path) -> str:
    """Time and memory of weight relevance as a Markdown table, from ``bench/relevance.csv``."""
    head = "network | relevance | time / training step | to reach | peak MiB, 50 and 400 images"
    lines = [f"| {head} (allowed) |", "|-|-|-|-|-|"]
    for row in pd.read_csv(results / "bench" / "relevance.csv").to_dict("records"):
        memory = f"{row['peak MiB']:.0f}, {row['peak MiB, 8 x images']:.0f}"
        allowed = f"({row['training peak + weights MiB']:.0f})"
        lines.append(
            f"| {row['model']} | {row['method']} | {row['ratio']:.2f} | {row['target']} "
            f"| {memory} {allowed} |"
        )
    return "\n".join(lines)


def filled(text: str, root: Path = ROOT) -> str:
    """The README's text with every block between markers written anew.

    Parameters
    ----------
    text : str
        Holds ``<!-- claims: PROFILE -->``, ``<!-- latency: bench -->`` or
        ``<!-- speed: bench -->``, then ``<!-- end -->``.
    root : Path
        Folder of ``results/``.

    Returns
    -------
    str
    """

    def block(match: re.Match) -> str:
        results = root / "results"
        tables = {"latency": latency_table, "speed": speed_table}
        if match["what"] == "bench":
            table = tables[match["kind"]](results)
        else:
            table = claims_table(results / match["what"])
        return f"<!-- {match['kind']}: {match['what']} -->\n\n{table}\n\n<!-- end -->"

    pattern = r"<!-- (?P<kind>claims|latency|speed): (?P<what>\w+) -->.*?<!-- end -->"
    return re.sub(pattern, block, text, flags=re.S)


def update() -> None:
    """Fill the README in place."""
    write(README, filled(README.read_text()))
