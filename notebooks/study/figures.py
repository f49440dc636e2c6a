"""Figures of tables, returned as matplotlib figures."""

import textwrap
from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .names import network, place, readable
from .palette import (
    BLACK,
    BLUE,
    EVEN,
    GREY,
    ORANGE,
    RED,
    SIGNED,
    contrasting,
    panels,
    points_lost_axis,
    put_ticks,
    style,
    styles,
    ticks,
)
from .tables import plain, points_lost
from .verdicts import FAILS, HOLDS, OPEN, TITLES

HEADLINE = ("lrp", "lrp root", "lrp, pruned", "paper's rule, literal, fine-tuned", "deeplift 100%",
            "magnitude 20%", "random", "reversed")  # fmt: skip
"""Of the main comparison, recipes that tell its story; more lines could not be told apart."""
VERDICTS = {HOLDS: BLUE, OPEN: "#e8e8e8", FAILS: ORANGE}  # dark, light and middle in grey print


def _by_network(table: pd.DataFrame, **size) -> tuple[Figure, list]:
    """A titled panel for each network: the figure, and pairs of axis and rows."""
    groups = list(table.groupby(["dataset", "model"], sort=False))
    figure, axes = panels(len(groups), **size)
    for axis, ((dataset, model), _) in zip(axes, groups, strict=True):
        axis.set(title=network(dataset, model))
    return figure, [(axis, part) for axis, (_, part) in zip(axes, groups, strict=True)]


def curves(
    table: pd.DataFrame,
    x: str,
    y: str,
    hue: str = "recipe",
    *,
    xlabel: str = "",
    ylabel: str = "",
    base: str = "",
    log: bool = False,
    beside: Iterable[str] = (),
    spread: str = "seeds",
) -> Figure:
    """Lines over a knob, a panel for each network, a band over seeds where there are several.

    Parameters
    ----------
    table : DataFrame
        With columns dataset, model, knob and those named by the other parameters.
    x, y, hue : str
        Columns of the axes and of the lines. Rows of one line and one knob are averaged.
    xlabel, ylabel : str
        Axis labels; the column's name by default.
    base : str
        Column of the uncompressed network's ``y``, an accuracy in percent. The y axis then shows
        the points lost against it (``palette.points_lost_axis``), and says so.
    log : bool
        Logarithmic x axis.
    beside : iterable of str
        Lines that both axes are not made for, since they would squeeze the others; they may leave
        a panel, and the legend says so.
    spread : str
        What the column ``seed`` counts, where it is something else.
    """
    if base:
        table = table.assign(**{y: table[base] - table[y]})
        ylabel = ylabel or f"points of {y.replace('_', ' ')} lost"
        ylabel += f"\n{EVEN}"
    beside = {*beside}
    methods = [*table[hue].unique()]  # of one look in all panels
    looks = dict(zip(methods, styles(map(str, methods)), strict=True))
    entries, leaving = {}, set()
    figure, panels = _by_network(table)
    for axis, part in panels:
        inside = part[~part[hue].isin(beside)]
        inside = inside if len(inside) else part
        for name, line in part.groupby(hue, sort=False):
            look = looks[name]
            means = line.groupby("knob")[[x, y]].agg(["mean", "min", "max"])
            means = means.sort_values((x, "mean"))
            (entries[name],) = axis.plot(
                means[x]["mean"], means[y]["mean"], label=readable(str(name)), lw=1.6, **look
            )
            ends = inside[x].min(), inside[x].max()
            if name in beside and not means[x]["mean"].between(*ends).all():
                leaving.add(name)
            if line["seed"].nunique() > 1:
                axis.fill_between(
                    means[x]["mean"], means[y]["min"], means[y]["max"], alpha=0.12, lw=0,
                    color=look["color"],
                )  # fmt: skip
        if base:
            points_lost_axis(axis, "y", inside.groupby([hue, "knob"])[y].mean())
        if log:
            axis.set_xscale("log")
            put_ticks(axis.xaxis, ticks(inside[x]))
            axis.tick_params(axis="x", labelrotation=30)
        elif (part[x] % 1 == 0).all():
            axis.xaxis.get_major_locator().set_params(integer=True)
        if len(inside) < len(part):
            axis.set_xlim(_around(inside[x], log))
        axis.set(xlabel=xlabel or x, ylabel=ylabel or y)
    handles = [entries[name] for name in methods]
    labels = [readable(str(name)) + "\n(leaves the panel)" * (name in leaving) for name in methods]
    if base:
        references = dict(zip(*panels[0][0].get_legend_handles_labels()[::-1], strict=True))
        said = "uncompressed", "one point lost"
        handles, labels = handles + [references[label] for label in said], [*labels, *said]
    if table.groupby(["dataset", "model"])["seed"].nunique().max() > 1:
        handles.append(Patch(fc=GREY, alpha=0.25))
        labels.append(f"range over {spread}")
    figure.legend(handles, labels, loc="outside right upper")
    figure.set_size_inches(figure.get_figwidth() + 2.4, figure.get_figheight())  # the legend's
    return figure


def _around(values: pd.Series, log: bool) -> tuple[float, float]:
    """The ends of an axis that shows values with a margin."""
    low, high = values.min(), values.max()
    if log:
        margin = (high / low) ** 0.05
        return low / margin, high * margin
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def files(
    table: pd.DataFrame, recipes: Iterable[str] = (), beside: Iterable[str] = ("uniform bits",)
) -> Figure:
    """``curves`` of points of test accuracy lost over bytes; of some recipes, or of all."""
    chosen = [*recipes] or table["recipe"].unique()
    return curves(
        table[table["recipe"].isin(chosen)], "file_bytes", "test_accuracy",
        base="base_test_accuracy", log=True, xlabel="file (bytes, logarithmic)",
        beside=beside,
    )  # fmt: skip


def ladder(table: pd.DataFrame) -> Figure:
    """A row for each recipe: the points lost, mean over seeds as a dot, their range as a line.

    A panel for each network. In a table with a column ``part``, rows of one part stand together
    under its name.
    """
    table = table.assign(lost=points_lost(table))
    table = table if "part" in table else table.assign(part="")
    rows = table[["part", "recipe"]].drop_duplicates().sort_values("part", kind="stable",
        key=lambda part: part.map({p: i for i, p in enumerate(part.unique())}))  # fmt: skip
    heads = rows["part"].ne(rows["part"].shift()) & rows["part"].ne("")
    places = dict(zip(rows["recipe"], np.arange(len(rows)) + heads.cumsum(), strict=True))
    figure, panels = _by_network(table, height=0.3 * (len(rows) + heads.sum()) + 1.4, width=5.2)
    for axis, part in panels:
        for name, lost in part.groupby("recipe", sort=False)["lost"]:
            _dot(axis, lost, places[name], name)
        lines = points_lost_axis(axis, "x", part["lost"])
        axis.set_yticks([*places.values()], map(readable, places))
        axis.set_ylim(len(rows) + heads.sum() - 0.4, -0.6)
        axis.set(xlabel=f"points of test accuracy lost\n{EVEN}")
    for axis, _ in panels:
        if not axis.get_subplotspec().is_first_col():
            axis.tick_params(axis="y", labelleft=False)
            continue
        for head, recipe in rows.loc[heads, ["part", "recipe"]].itertuples(index=False):
            axis.text(-0.02, places[recipe] - 1, head, ha="right", va="center", weight="bold",
                      transform=axis.get_yaxis_transform())  # fmt: skip
    figure.legend(handles=lines, ncols=2, loc="outside lower center")
    return figure


def verdicts(claims: pd.DataFrame) -> Figure:
    """Claims × networks: how many readings of each hold, are open, and fail.

    Of ``TITLES`` those are shown that ``claims`` (id, where, verdict, seeds; a row for each
    reading) has. Each cell is parted by verdict, and empty where a network was not asked.
    """
    claims = claims[claims["id"].isin(TITLES)]
    claims = claims.assign(where=claims["where"].map(place))
    several = {*claims.loc[claims["seeds"].map(len) > 1, "where"]}
    rows = [name for name in TITLES if name in set(claims["id"])]
    columns = [*claims["where"].unique()]
    figure, axis = plt.subplots(figsize=(1.5 * len(columns) + 3.8, 0.46 * len(rows) + 1.4))
    for (name, where), found in claims.groupby(["id", "where"])["verdict"]:
        left, shares = columns.index(where) + 0.03, found.value_counts()
        for verdict, colour in VERDICTS.items():
            if count := shares.get(verdict, 0):
                width = 0.94 * count / len(found)
                axis.barh(rows.index(name), width, 0.76, left, color=colour, ec=GREY, lw=0.5)
                axis.text(left + width / 2, rows.index(name), count, ha="center", va="center",
                          color=contrasting(colour), fontsize=9)  # fmt: skip
                left += width
    titles = [textwrap.fill(f"{name}: {TITLES[name]}", 48) for name in rows]
    titles = [title.replace("<=", "≤") for title in titles]
    axis.set_yticks(range(len(rows)), titles, fontsize=9)
    called = [c.replace(" on ", "\non ") + "\n(one seed)" * (c not in several) for c in columns]
    axis.set_xticks(np.arange(len(columns)) + 0.5, called)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.set(xlim=(0, len(columns)), ylim=(len(rows) - 0.5, -0.5))
    axis.spines[:].set_visible(False)
    axis.grid(False)
    said = {HOLDS: "hold", OPEN: "are open", FAILS: "fail"}
    handles = [Patch(fc=c, ec=GREY, label=said[verdict]) for verdict, c in VERDICTS.items()]
    figure.legend(handles=handles, title="how many readings of a claim", ncols=3,
                  loc="outside lower center")  # fmt: skip
    return figure


def matrix(
    values: pd.DataFrame, title: str = "", low: float = -1, high: float = 1, digits: int = 2
) -> Figure:
    """A labelled matrix with its numbers, such as rank correlations; cells that are NaN stay empty.

    Rows and columns are shown under their names; ``low`` and ``high`` are the ends of the colours.
    """
    rows, columns = values.shape
    width, height = 0.42 + 0.1 * digits, 0.35 + 0.05 * digits  # of a cell
    figure, axis = plt.subplots(figsize=(width * columns + 2.6, height * rows + 1.6))
    colours = SIGNED if low < 0 else "Blues"
    image = axis.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    for (row, column), value in np.ndenumerate(values.to_numpy()):
        if not np.isnan(value):
            said = f"{plain(value, digits):.{digits}f}"
            axis.text(column, row, said, ha="center", va="center", fontsize=8,
                      color=contrasting(image.to_rgba(value)))  # fmt: skip
    called = [readable(str(n)) for n in values.columns]
    turned = {"rotation": 45, "ha": "right"} if max(map(len, called)) > 2 else {}
    axis.set_xticks(range(columns), called, **turned)
    axis.set_yticks(range(rows), [readable(str(n)) for n in values.index])
    axis.grid(False)
    axis.set(title=title, xlabel=values.columns.name or "", ylabel=values.index.name or "")
    return figure


def smallest(best: pd.DataFrame) -> Figure:
    """The smallest file of each recipe that loses little: mean and range, smallest on top.

    A panel for each network of ``tables.smallest_files``; recipes that never reached the accuracy
    are crosses.
    """
    figure, panels = _by_network(best, height=0.27 * best["recipe"].nunique() + 1.3, width=5.8)
    for axis, part in panels:
        kilobytes = part["file_bytes"] / 1000
        groups = part.assign(kB=kilobytes).groupby("recipe")
        sizes = groups.agg(mean=("kB", "mean"), reached=("reached", "all"))
        sizes = sizes.sort_values(["reached", "mean"], ascending=[False, True])
        for row, (name, reached) in enumerate(sizes["reached"].items()):
            _dot(axis, kilobytes[part["recipe"] == name], row, name, "o" if reached else "x")
        axis.set_yticks(range(len(sizes)), map(readable, sizes.index), fontsize=8)
        axis.invert_yaxis()
        axis.set(xscale="log", xlabel="file (kB, logarithmic)")
        put_ticks(axis.xaxis, ticks(kilobytes))
    looks = {
        "relevance": ("o", BLUE),
        "other criteria": ("o", RED),
        "controls": ("o", GREY),
        "not within one point for every seed": ("x", BLACK),
    }
    handles = [plt.Line2D([], [], ls="", marker=m, color=c, label=k) for k, (m, c) in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _dot(axis: Axes, values: pd.Series, row: int, name: str, marker: str = "o") -> None:
    """The mean over seeds as a dot and their range as a line, in the colour of a method."""
    colour = style(name, 0)["color"]
    colour = GREY if colour == BLACK else colour  # rows tell controls apart, and a legend has one
    axis.plot([values.min(), values.max()], [row, row], color=colour, lw=2, alpha=0.4)
    axis.plot(values.mean(), row, marker, color=colour)
