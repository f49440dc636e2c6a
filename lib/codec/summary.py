"""What each layer takes in a file, as rows and as a table."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

HEADER = ("layer", "weights", "kept", "bits a weight", "bytes", "share")

_FORMATS = ("", ",", ",", ".3f", ",", ".1%")


@dataclass(frozen=True)
class LayerSummary:
    """One row of :class:`Summary`: a quantized weight, or ``(rest)``: all else and the header."""

    layer: str
    weights: int  # elements
    kept: int  # those that decode to other than zero
    bits: float  # in the file for each of `weights`; NaN where there are none
    bytes: int  # in the file
    share: float  # of the file's size


class Summary(list[LayerSummary]):
    """Rows of a file's summary: a list that prints as a table, in notebooks too.

    ``pandas.DataFrame(summary)`` has a column for each attribute of :class:`LayerSummary`.
    """

    def __repr__(self) -> str:
        return aligned(HEADER, [tuple(map(format, astuple(row), _FORMATS)) for row in self])


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
