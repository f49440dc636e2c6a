"""The report: an executed notebook as one HTML file that asks nothing of any network."""

import html
import re
from pathlib import Path

import nbformat
from nbconvert.filters.markdown_mistune import markdown2html_mistune

from .records import write

MOST = 8_000_000  # bytes
ASKS = "## Change this"
"""Heading of a section that asks its reader to edit code; a report has none."""
STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ccc; --soft: #f4f4f4;
  --link: #00598c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --paper: #1b1b1b; --line: #555; --soft: #282828; --link: #8ecdf5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; color: var(--ink); overflow-wrap: anywhere;
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
a { color: var(--link); }
nav { background: var(--soft); padding: 0.5rem 1rem; }
nav ol { columns: 18rem; column-gap: 2.5rem; margin: 0.5rem 0; }
figure { margin: 1rem 0; }
img { background: #fff; display: block; height: auto; max-width: 100%; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border: 0; border-collapse: collapse; font-size: 0.8rem; overflow-wrap: normal; }
th, td { border: 0; border-bottom: 1px solid var(--line); padding: 0.2rem 0.6rem;
  text-align: right; vertical-align: top; }
summary { cursor: pointer; margin: 1rem 0; }
pre { white-space: pre-wrap; }
code { background: var(--soft); }
@page { size: A4; margin: 15mm; }
@media print {
  :root { --ink: #000; --paper: #fff; --line: #999; --soft: #fff; --link: #000; }
  body { font-size: 9.5pt; max-width: none; padding: 0; }
  .wide { overflow: visible; }
  table { font-size: 6.5pt; width: 100%; overflow-wrap: break-word; }
  table:has(tr > :nth-child(14)) { overflow-wrap: anywhere; }
  th, td { padding: 1px 3px; }
  tr, figure { break-inside: avoid; }
  h2, h3, summary, p:has(+ figure), p:has(+ .wide), p:has(+ details) { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""
"""Light, dark and print; tables alone may be wider than a screen, and are then moved sideways.

On paper nothing moves: there words are broken, but only in tables of so many columns that whole
ones would not fit.
"""


def report(executed: Path, target: Path) -> None:
    """Write a notebook's texts, tables and figures, without its code, as one HTML file.

    The notebook's first heading becomes the title; links to tables are made relative to the folder
    of ``target``, such as ``results/quick/report.html``. A ValueError says that the file would be
    larger than ``MOST``, or that the notebook has no heading.
    """
    headings: list[tuple[str, str]] = []
    body, last, figures = [], "", 0
    asks = False
    for cell in nbformat.read(executed, as_version=4).cells:
        if cell.cell_type == "markdown" and re.search(r"^#", cell.source, flags=re.M):
            asks = ASKS in cell.source
        if asks:
            continue
        if cell.cell_type == "markdown":
            body.append(_texts(cell.source, headings))
            last = cell.source
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if output.get("name") == "stdout":
                body.append(f"<p>{html.escape(output['text'])}</p>")
            elif "image/png" in data:
                figures += 1
                body.append(_figure(data["image/png"], figures, headings, last))
            elif "text/html" in data:
                body.append(_wide("".join(data["text/html"])))
    if not headings:
        raise ValueError(f"{executed} has no heading")
    title = html.unescape(headings[0][1])
    links = (f'<li><a href="#{anchor}">{text}</a></li>' for anchor, text in headings[1:])
    first, *rest = body
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'{first}\n<nav aria-label="Contents">Contents<ol>{"".join(links)}</ol></nav>\n'
        + "\n".join(rest)
        + "\n</body>\n</html>\n"
    )
    page = page.replace(f"../results/{target.parent.name}/", "")
    page = re.sub(r'href="(?=\d\d-[\w-]+\.ipynb)', 'href="../../notebooks/', page)
    if len(page.encode()) > MOST:
        raise ValueError(f"the report would take {len(page):,} bytes, more than {MOST:,}")
    write(target, page)


def _texts(source: str, headings: list[tuple[str, str]]) -> str:
    """Markdown as HTML; its headings get anchors, and are noted."""

    def noted(match: re.Match) -> str:
        text = re.sub(r'<a class="anchor-link".*?</a>', "", match[3], flags=re.S)
        headings.append((f"s{len(headings)}", re.sub(r"<.*?>", "", text).strip()))
        return f'<h{match[1]} id="{headings[-1][0]}">{headings[-1][1]}</h{match[1]}>'

    return re.sub(r"<h([1-3])([^>]*)>(.*?)</h\1>", noted, markdown2html_mistune(source), flags=re.S)


def _figure(content: str, number: int, headings: list[tuple[str, str]], text: str) -> str:
    """A picture with what stands before it as its alternative text."""
    last = re.sub(r"[*`#]|\]\(.*?\)|\[", "", text.strip().split("\n\n")[-1]).strip()
    said = f"Figure {number}, {html.unescape(headings[-1][1]) if headings else ''}: {last}"
    alternative = html.escape(said[:300], quote=True)
    source = f"data:image/png;base64,{''.join(content.split())}"
    return f'<figure><img alt="{alternative}" src="{source}"></figure>'


def _wide(said: str) -> str:
    """HTML whose tables are moved sideways where the page is too narrow for them."""
    return re.sub(r"<table.*?</table>", r'<div class="wide">\g<0></div>', said, flags=re.S)
