"""Files of other coders beside ours, where ``make peers`` was run; and variants of ours."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from .bdrate import bd_table
from .names import place, readable
from .paths import STANDARD
from .tables import NETWORK, smallest_files, text

TABLES = (STANDARD, "peers")
"""Of ``bench/peers``: rows are files, each with the settings that it was made with."""
CLASS = 1.1
"""Factor between the sizes at which curves over seeds are averaged."""


def read(study) -> pd.DataFrame:
    """Files of all other coders, a recipe for each coder; says so in one line if there are none.

    Parameters
    ----------
    study : Study
        Whose ``results`` are read.

    Returns
    -------
    DataFrame
        Those columns that ``Study.sweep`` has too, and what the coders were set to; no rows where
        no coder was run.
    """
    found = [
        pd.read_csv(path) for name in TABLES if (path := study.results / f"{name}.csv").exists()
    ]
    if not found:
        print(f"other coders were not run: make peers PROFILE={study.name}")
        return pd.DataFrame(columns=[*NETWORK, "recipe"])
    rows = pd.concat(found)
    ours = {(case.dataset, case.model, case.seed) for case in study.cases}
    return rows[[key in ours for key in zip(*(rows[c] for c in (*NETWORK, "seed")), strict=True)]]


def trials(study) -> pd.DataFrame:
    """What variants of ours bring, as of ``bench/bench_trials.py``; says so if none was tried.

    ``study`` is the ``Study`` whose ``results`` are read. Columns as of ``bdrate.bd_table``, by
    points of validation accuracy lost; the networks by what they are called in figures.
    """
    path = study.results / "trials-rates.csv"
    if not path.exists():
        print(f"variants were not tried: python bench/bench_trials.py {study.name}")
        return pd.DataFrame(columns=["recipe", "against"], dtype=str)
    return bd_table(pd.read_csv(path).fillna({"why": ""})).rename(columns=place)


def curves(ours: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """Both in one table for ``figures.files``, other coders' files by classes of size.

    Their settings differ from seed to seed, so that files of about one size stand for one point
    of a curve.
    """
    sizes = np.log(others["file_bytes"].to_numpy(float)) / np.log(CLASS)
    return pd.concat([ours, others.assign(knob=CLASS ** np.floor(sizes))])


def smallest(
    tables: Iterable[pd.DataFrame], recipes: Iterable[str], drops: tuple[float, ...] = (0.5, 1.0)
) -> pd.DataFrame:
    """The smallest files of recipes that lose little on validation, in kB: ``34.6 / 20.5``.

    Parameters
    ----------
    tables : iterable of DataFrame
        Of ``Study.sweep``, and of ``read``.
    recipes : iterable of str
        A row for each, in this order; those without files are left out.
    drops : tuple of float
        Points of validation accuracy that may be lost.

    Returns
    -------
    DataFrame
        A column for each network. Means over seeds with 95 % intervals, one for each of ``drops``;
        a dash where some seed loses more in every file.
    """
    table = pd.concat(tables)
    chosen = [name for name in recipes if name in set(table["recipe"])]
    best = [smallest_files([table[table["recipe"].isin(chosen)]], drop) for drop in drops]
    cells: dict[str, dict[str, list[str]]] = {name: {} for name in chosen}
    for each in best:
        for (dataset, model, recipe), part in each.groupby([*NETWORK, "recipe"], sort=False):
            reached = part["reached"].all()
            size = text(part["file_bytes"] / 1000) if reached else "–"
            cells[recipe].setdefault(place(f"{dataset}-{model}"), []).append(size)
    networks = list(dict.fromkeys(name for found in cells.values() for name in found))
    rows = [
        {"": readable(name)} | {where: " / ".join(found.get(where, [])) for where in networks}
        for name, found in cells.items()
    ]
    return pd.DataFrame(rows)
