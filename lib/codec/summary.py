"""What each layer takes in a file, as rows and as a table."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

HEADER = ("layer", "weights", "kept", "bits a weight", "bytes", "share")

_FORMATS = ("", ",", ",", ".3f", ",", ".1%")


@dataclass(frozen=True)
class LayerSummary:
    """One row of :class:`Summary`.

    Parameters
    ----------
    layer : str
        Name of a quantized weight in the state_dict; ``(rest)`` for all other entries and the
        file's header.
    weights : int
        Elements.
    kept : int
        Those that decode to other than zero.
    bits : float
        Bits in the file for each of `weights`; NaN where there are none.
    bytes : int
        Size in the file.
    share : float
        `bytes` over the size of the file.
    """

    layer: str
    weights: int
    kept: int
    bits: float
    bytes: int
    share: float


class Summary(list[LayerSummary]):
    """Rows of a file's summary: a list that prints as a table, in notebooks too.

    ``pandas.DataFrame(summary)`` has a column for each attribute of :class:`LayerSummary`.
    """

    def __str__(self) -> str:
        return aligned(HEADER, self._cells())

    def _repr_html_(self) -> str:
        rows = [_row("th", HEADER), *(_row("td", cells) for cells in self._cells())]
        return f"<table>{''.join(rows)}</table>"

    def _cells(self) -> list[tuple[str, ...]]:
        return [tuple(map(format, astuple(row), _FORMATS)) for row in self]


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A text table: the first `left` columns to the left, numbers in all others to the right."""
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )


def _row(tag: str, cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
