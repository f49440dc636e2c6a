"""From tables of runs to operating points: means, intervals, smallest files."""

import html
from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
import scipy

NETWORK = ["dataset", "model"]


def interval(values: Iterable[float]) -> float:
    """Half width of the 95 % interval of a mean (Student's t); NaN for a single value."""
    values = np.asarray(list(values), dtype=float)
    if len(values) < 2:
        return float("nan")
    quantile = scipy.stats.t.ppf(0.975, len(values) - 1)
    return float(quantile * values.std(ddof=1) / np.sqrt(len(values)))


def text(values: Iterable[float], digits: int = 1, unit: str = "") -> str:
    """A mean with its interval, such as ``12.3 ± 0.4 %``."""
    values = list(values)
    half = interval(values)
    spread = "" if np.isnan(half) else f" ± {half:.{digits}f}"
    return f"{np.mean(values):.{digits}f}{spread}{unit}"


def each_network(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each network, with its name such as ``mnist-lenet5``."""
    for (dataset, model), part in table.groupby(NETWORK, sort=False):
        yield f"{dataset}-{model}", part


def points_lost(runs):
    """Points of test accuracy lost against the base network: of a table of runs, or a row of it."""
    return runs["base_test_accuracy"] - runs["test_accuracy"]


def summarise(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Means over seeds: a table of ``Study.sweep`` with one row for each value of ``by``.

    Columns: ``by``, seeds, kept (%), file bytes, ratio, val accuracy, test accuracy (percent), ±
    (its 95 % interval) and points lost.
    """
    groups = table.assign(lost=points_lost(table)).groupby(by, sort=False)
    return pd.DataFrame(
        {
            "seeds": groups["seed"].nunique(),
            "kept (%)": 100 * groups["density"].mean(),
            "file bytes": groups["file_bytes"].mean(),
            "ratio": groups["ratio"].mean(),
            "val accuracy": groups["val_accuracy"].mean(),
            "test accuracy": groups["test_accuracy"].mean(),
            "±": groups["test_accuracy"].agg(interval),
            "points lost": groups["lost"].mean(),
        }
    ).reset_index()


def smallest(files: pd.DataFrame, good: pd.Series) -> pd.DataFrame:
    """The smallest good one of some files; where none is good, the most accurate on validation."""
    if good.any():
        return files[good].nsmallest(1, "file_bytes")
    return files.nlargest(1, "val_accuracy")


def smallest_files(tables: Iterable[pd.DataFrame], max_drop: float) -> pd.DataFrame:
    """The smallest file of each recipe that loses at most so many points on validation.

    A row of ``tables``, of ``Study.sweep``, for each dataset, model, seed and recipe. ``reached``
    is False, and the most accurate file stands in, where every file loses more.
    """
    table = pd.concat(tables).drop_duplicates([*NETWORK, "seed", "recipe", "knob"])
    drop = table["base_val_accuracy"] - table["val_accuracy"]
    table = table.assign(reached=drop <= max_drop + 1e-9)
    groups = table.groupby([*NETWORK, "seed", "recipe"], sort=False)
    chosen = [smallest(part, part["reached"]) for _, part in groups]
    return pd.concat(chosen).reset_index(drop=True)


def operating_points(best: pd.DataFrame) -> pd.DataFrame:
    """``summarise`` of ``smallest_files``, with the share of seeds that reached the accuracy."""
    keys = [*NETWORK, "recipe"]
    reached = best.groupby(keys, sort=False)["reached"].mean().mul(100).map("{:.0f} %".format)
    return summarise(best, keys).merge(reached.reset_index(), on=keys, validate="one_to_one")


def plain(value: float, digits: int) -> float:
    """A value rounded to so many digits, without the sign of a zero."""
    return round(value, digits) + 0.0


class Table:
    """A table for the eye: HTML in a notebook, whose numbers are tested in ``results/`` instead.

    Texts stand left, numbers right; what is not a number is a dash. Floating-point columns have so
    many digits, none where all are whole or values reach a thousand, such as bytes. A long table
    may be folded: it is then unfolded by a click on what ``fold`` calls it.
    """

    def __init__(self, frame: pd.DataFrame, digits: int = 2, fold: str = ""):
        self.frame, self.digits, self.fold = frame, digits, fold

    def __repr__(self):
        rows, columns = self.frame.shape
        return f"table of {rows} rows and {columns} columns"

    def _repr_html_(self):
        index = not isinstance(self.frame.index, pd.RangeIndex)
        texts = {name for name, column in self.frame.items() if not _counts(column)}
        frame = self.frame.apply(self._said)
        frame = frame.rename(columns=lambda name: (_left if name in texts else _escaped)(name))
        if index:
            frame = frame.rename(index=lambda v: (_left if isinstance(v, str) else _escaped)(v))
        said = frame.to_html(index=index, escape=False)
        return f"<details><summary>{self.fold}</summary>{said}</details>" if self.fold else said

    def _said(self, column: pd.Series) -> pd.Series:
        if not _counts(column):
            return column.fillna("").map(_left)
        whole = (column.dropna() % 1 == 0).all() or column.abs().max() >= 1000
        digits = 0 if whole else self.digits
        return column.map(
            lambda value: "–" if pd.isna(value) else f"{plain(value, digits):,.{digits}f}"
        )


def _counts(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _escaped(value: object) -> str:
    return html.escape(str(value))


def _left(value: object) -> str:
    return f'<div style="text-align: left">{_escaped(value)}</div>'
