"""How figures look: colours and markers, one of each for a method; panels; ticks."""

from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

plt.rcParams.update(
    {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "font.size": 10,
        "figure.constrained_layout.use": True,
        "figure.dpi": 100,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "svg.hashsalt": "xai-compression",
    }
)

BLUE, ORANGE, GREEN, SKY = "#0072b2", "#e69f00", "#009e73", "#56b4e9"
RED, PURPLE, BLACK, GREY = "#d55e00", "#cc79a7", "#222222", "#8a8a8a"
INDIGO, WINE = "#332288", "#882255"
"""Okabe and Ito's palette and two dark colours of Tol's, told apart by colour-blind readers; in
grey print markers and hatches do it."""
SIGNED = "RdBu_r"  # red for, blue against
_CONTROLS = {"random": (GREY, "--"), "shuffled": (BLACK, "-."), "reversed": (BLACK, ":")}
_BASELINES = ("deeplift", "magnitude", "taylor", "fisher", "hessian", "alike", "uniform",
              "nncodec", "deep compression", "gptq", "quanto", "torchao")  # fmt: skip
_OURS, _THEIRS = (BLUE, SKY, GREEN, INDIGO), (RED, ORANGE, PURPLE, WINE)
_MARKERS = "osD^vPX*<>"
_FIXED = {
    "lrp root, sequential": BLUE, "alike, sequential": ORANGE, "fisher, sequential": PURPLE,
    "lrp root, sequential, more images": INDIGO, "alike, sequential, more images": WINE,
    "lrp, sequential": GREEN, "lrp, pruned, sequential": GREEN, "lrp root": SKY, "nncodec": RED,
    "alike, trained": ORANGE, "fisher, trained": PURPLE, "ECQx": RED,
}  # fmt: skip
"""Recipes that several figures of one notebook show, so that each keeps its colour there."""


def style(name: str, position: int, taken: Iterable[str] = ()) -> dict:
    """Controls are dashed, grey or black; baselines take warm colours first, all others cool."""
    marker = {"marker": _MARKERS[position % len(_MARKERS)], "ms": 5}
    for family, (colour, line) in _CONTROLS.items():
        if family in name:
            return {"color": colour, "ls": line, **marker}
    if name in _FIXED and _FIXED[name] not in taken:
        return {"color": _FIXED[name], "ls": "-", **marker}
    theirs = any(family in name for family in _BASELINES)
    colours = _THEIRS + _OURS if theirs else _OURS + _THEIRS
    free = [colour for colour in colours if colour not in taken]
    return {"color": free[0] if free else colours[position % 4], "ls": "-", **marker}


def styles(names: Iterable[str]) -> list[dict]:
    """A style for each: no two share a marker, nor a colour while some are left."""
    names, found = [*names], []
    for position, name in enumerate(names):
        later = [_FIXED[other] for other in names[position + 1 :] if other in _FIXED]
        look = style(name, position, [*(each["color"] for each in found), *later])
        twice = any((look["color"], look["ls"]) == (each["color"], each["ls"]) for each in found)
        found.append(look | {"color": GREY} if twice and look["ls"] != "-" else look)
    return found


def panels(count: int, height: float = 3.4, width: float = 4.6) -> tuple[Figure, list]:
    """Axes side by side, in two rows where one would be too wide to be read on a page."""
    rows = 1 if count * width <= 16 else 2
    columns = -(-count // rows)
    size = width * columns, height * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    if rows > 1:  # else labels of the upper row would touch the titles of the lower one
        figure.get_layout_engine().set(h_pad=0.15)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat[:count])


def contrasting(colour: tuple[float, ...]) -> str:
    """Black or white, whichever can be read on a colour (WCAG relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return "white" if np.dot((0.2126, 0.7152, 0.0722), linear) < 0.179 else "black"


def put_ticks(axis: Axis, values: list[float]) -> None:
    axis.set_major_locator(FixedLocator(values))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.9g}"))


def ticks(values: pd.Series) -> list[float]:
    """1, 2 and 5 times powers of ten within the range of values; more steps if it is narrow.

    The ends of a range without any two of these.
    """
    low, high = values.min(), values.max()
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        found = [step * 10.0**power for power in powers for step in steps]
        within = [tick for tick in found if 0.999 * low <= tick <= 1.001 * high]
        if len(within) > 1:
            return within
    return sorted({float(f"{end:.2g}") for end in (low, high)})


EVEN = "(even to 1, then logarithmic)"
"""What the label of an axis of points lost has to say."""


def points_lost_axis(axes: Axes, which: str, values: pd.Series) -> list[Line2D]:
    """Make ``x`` or ``y`` an axis of points lost against the uncompressed network.

    It is linear up to one point, where methods are compared, and logarithmic beyond; fewer points
    lost are higher. Gives the lines at zero and at one point, with their labels.
    """
    across = {"x": axes.axvline, "y": axes.axhline}[which]
    lines = [across(0, color="black", lw=0.8, ls=":", label="uncompressed"),
             across(1, color="black", lw=0.8, label="one point lost")]  # fmt: skip
    gained = values.min() < -0.1  # then a tick shows how much
    ends = min(-0.55 if gained else -0.3, values.min() - 0.1), max(1.5, 1.3 * values.max())
    getattr(axes, f"set_{which}scale")("symlog", linthresh=1)
    axes.set(**{f"{which}lim": ends if which == "x" else ends[::-1]})
    put_ticks(getattr(axes, f"{which}axis"), [-1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50, 100])
    return lines
