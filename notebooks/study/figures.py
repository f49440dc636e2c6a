"""Figures of tables: one look, one colour for each method, returned as matplotlib figures."""

from collections.abc import Iterable
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .names import network, readable

plt.rcParams.update(
    {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "font.size": 10,
        "figure.dpi": 100,
        "legend.frameon": False,
        "svg.hashsalt": "xai-compression",
    }
)

BLUE, ORANGE, GREEN, SKY = "#0072b2", "#e69f00", "#009e73", "#56b4e9"
RED, PURPLE, BLACK, GREY = "#d55e00", "#cc79a7", "#222222", "#8a8a8a"
"""Okabe and Ito's palette, told apart by colour-blind readers; in grey print markers and hatches
do it."""
SIGNED = "RdBu_r"  # red for, blue against
_CONTROLS = {"random": (GREY, "--"), "shuffled": (GREY, "--"), "reversed": (BLACK, ":")}
_BASELINES = ("deeplift", "magnitude", "taylor", "fisher", "alike", "uniform")
_OURS, _THEIRS = (BLUE, SKY, GREEN, PURPLE), (RED, ORANGE, PURPLE, GREEN)
_MARKERS, _HATCHES = "osD^vPX*<>", ("", "//", "..", "xx", "--", "++", "oo")


def _style(name: str, position: int, taken: Iterable[str] = ()) -> dict:
    """Controls are grey and dashed; baselines take warm colours first, all others cool ones."""
    marker = {"marker": _MARKERS[position % len(_MARKERS)], "ms": 5}
    for family, (colour, line) in _CONTROLS.items():
        if family in name:
            return {"color": colour, "ls": line, **marker}
    theirs = any(family in name for family in _BASELINES)
    colours = _THEIRS + _OURS if theirs else _OURS + _THEIRS
    free = [colour for colour in colours if colour not in taken]
    return {"color": free[0] if free else colours[position % 4], "ls": "-", **marker}


def _styles(names: Iterable[str]) -> list[dict]:
    """A style for each: no two share a marker, nor a colour while some are left."""
    styles = []
    for position, name in enumerate(names):
        styles.append(_style(name, position, [style["color"] for style in styles]))
    return styles


def panels(count: int, height: float = 3.4, width: float = 4.6) -> tuple[Figure, list]:
    figure, axes = plt.subplots(
        1, count, figsize=(width * count, height), squeeze=False, layout="constrained"
    )
    return figure, list(axes[0])


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
        the points lost against it, and says so: linear up to one point, where methods are
        compared, logarithmic beyond.
    log : bool
        Logarithmic x axis.

    Returns
    -------
    Figure
    """
    if base:
        table = table.assign(**{y: table[base] - table[y]})
        ylabel = ylabel or f"points of {y.replace('_', ' ')} lost"
        ylabel += "\n(even steps up to 1, logarithmic beyond)"
    figure, panels = _by_network(table)
    for axis, part in panels:
        lines = list(part.groupby(hue, sort=False))
        for (name, line), style in zip(lines, _styles(str(n) for n, _ in lines), strict=True):
            means = line.groupby("knob")[[x, y]].agg(["mean", "min", "max"])
            means = means.sort_values((x, "mean"))
            axis.plot(
                means[x]["mean"], means[y]["mean"], label=readable(str(name)), lw=1.6, **style
            )
            if line["seed"].nunique() > 1:
                axis.fill_between(
                    means[x]["mean"], means[y]["min"], means[y]["max"], alpha=0.12, lw=0,
                    color=style["color"],
                )  # fmt: skip
        if base:
            axis.axhline(0, color="black", lw=0.8, ls=":", label="uncompressed")
            axis.axhline(1, color="black", lw=0.8, label="one point lost")
            axis.set_yscale("symlog", linthresh=1)
            losses = part.groupby([hue, "knob"])[y].mean()
            axis.set_ylim(max(1.5, 1.3 * losses.max()), min(-0.3, losses.min() - 0.1))
            _put_ticks(axis.yaxis, [-1, 0, 0.5, 1, 2, 5, 10, 20, 50, 100])
        if log:
            axis.set_xscale("log")
            _put_ticks(axis.xaxis, _ticks(part[x]))
            axis.tick_params(axis="x", labelrotation=30)
        axis.set(xlabel=xlabel or x, ylabel=ylabel or y)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    return figure


def contrasting(colour: tuple[float, ...]) -> str:
    """Black or white, whichever can be read on a colour (WCAG relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return "white" if np.dot((0.2126, 0.7152, 0.0722), linear) < 0.179 else "black"


def _put_ticks(axis: Axis, values: list[float]) -> None:
    axis.set_major_locator(FixedLocator(values))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.9g}"))


def _ticks(values: pd.Series) -> list[float]:
    """1, 2 and 5 times powers of ten within the range of values, or its ends if it is narrow."""
    low, high = values.min(), values.max()
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    within = [tick for tick in ticks if 0.999 * low <= tick <= 1.001 * high]
    return within if len(within) > 1 else [float(f"{end:.2g}") for end in (low, high)]


def bars(table: pd.DataFrame, x: str, y: str, hue: str, *, ylabel: str = "") -> Figure:
    """Grouped bars, such as bits per layer by recipe; a panel for each network.

    Parameters
    ----------
    table : DataFrame
        With columns dataset and model, and those named by the other parameters.
    x, y, hue : str
        Columns of the groups, the heights and the bars of a group.
    ylabel : str
        Axis label; the column's name by default.

    Returns
    -------
    Figure
    """
    figure, panels = _by_network(table, width=6)
    for axis, part in panels:
        wide = part.pivot_table(index=x, columns=hue, values=y, sort=False)
        colours = [style["color"] for style in _styles(map(str, wide.columns))]
        wide.rename(columns=readable).plot.bar(ax=axis, color=colours, width=0.8, legend=False)
        for bar, hatch in zip(axis.containers, cycle(_HATCHES), strict=False):
            plt.setp(bar, hatch=hatch, edgecolor="white", lw=0.5)
        axis.set(xlabel="", ylabel=ylabel or y)
        axis.set_xticklabels(wide.index, rotation=45, ha="right", fontsize=8)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    return figure


def ladder(table: pd.DataFrame, *, x: str = "test_accuracy", xlabel: str = "") -> Figure:
    """A row for each recipe: the mean over seeds as a dot, their range as a line.

    Parameters
    ----------
    table : DataFrame
        Of ``Study.sweep``; a panel for each network.
    x : str
        Column shown.
    xlabel : str
        Axis label; the column's name by default.

    Returns
    -------
    Figure
    """
    figure, panels = _by_network(table, height=0.3 * table["recipe"].nunique() + 1.2, width=5.2)
    for axis, part in panels:
        values = part.groupby("recipe", sort=False)[x].agg(["mean", "min", "max"])
        for place, (name, row) in enumerate(values.iterrows()):
            colour = _style(name, 0)["color"]
            axis.plot([row["min"], row["max"]], [place, place], color=colour, lw=2, alpha=0.4)
            axis.plot(row["mean"], place, "o", color=colour, ms=6)
        dotted = axis.axvline(part[f"base_{x}"].mean(), color="black", lw=0.8, ls=":")
        axis.set_yticks(range(len(values)), map(readable, values.index))
        axis.invert_yaxis()
        axis.set(xlabel=xlabel or x)
    for axis, _ in panels[1:]:
        axis.tick_params(axis="y", labelleft=False)
    figure.legend([dotted], ["uncompressed"], loc="outside lower center", fontsize=9)
    return figure


def matrix(values: pd.DataFrame, title: str = "", low: float = -1, high: float = 1) -> Figure:
    """A labelled matrix with its numbers, such as rank correlations.

    Parameters
    ----------
    values : DataFrame
        Rows and columns as shown.
    title : str
        Of the figure.
    low, high : float
        Ends of the colour scale.

    Returns
    -------
    Figure
    """
    rows, columns = values.shape
    figure, axis = plt.subplots(
        figsize=(0.62 * columns + 2.6, 0.45 * rows + 1.6), layout="constrained"
    )
    image = axis.imshow(
        values, cmap=SIGNED if low < 0 else "viridis", vmin=low, vmax=high, aspect="auto"
    )
    for (row, column), value in np.ndenumerate(values.to_numpy()):
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8,
                  color=contrasting(image.to_rgba(value)))  # fmt: skip
    axis.set_xticks(range(columns), [readable(str(n)) for n in values.columns], rotation=45,
                    ha="right")  # fmt: skip
    axis.set_yticks(range(rows), [readable(str(n)) for n in values.index])
    axis.grid(False)
    axis.set_title(title)
    return figure


def smallest(best: pd.DataFrame) -> Figure:
    """The smallest file of each recipe that loses little, as dots, smallest on top.

    Parameters
    ----------
    best : DataFrame
        Of ``tables.smallest_files``; recipes that never reached the accuracy are crosses.

    Returns
    -------
    Figure
        A panel for each network.
    """
    figure, panels = _by_network(best, height=0.27 * best["recipe"].nunique() + 1.3, width=5.8)
    for axis, part in panels:
        means = part.groupby("recipe").agg(size=("file_bytes", "mean"), reached=("reached", "all"))
        means = means.sort_values(["reached", "size"], ascending=[False, True])
        for place, (reached, size) in enumerate(zip(means["reached"], means["size"], strict=True)):
            axis.plot(size / 1000, place, "o" if reached else "x", color=BLUE if reached else GREY)
        axis.set_yticks(range(len(means)), map(readable, means.index), fontsize=8)
        axis.invert_yaxis()
        axis.set(xscale="log", xlabel="file (kB)")
    labels = {"reached": ("o", BLUE), "never within one point": ("x", GREY)}
    handles = [
        plt.Line2D([], [], ls="", marker=m, color=c, label=k) for k, (m, c) in labels.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9)
    return figure
