"""Figures of single steps: a network small enough to see, a rule on a layer, a row on its grid."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy
import torch
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

from .figures import curves
from .names import readable
from .palette import BLACK, BLUE, GREY, RED, SIGNED, SKY, panels
from .pictures import bare, grid, squares

BITS = {0: "#ffffff", 2: "#c6dbef", 4: "#56a0d3", 8: "#08306b"}
"""Of a tier: the more bits, the darker, in grey too."""


def tiny_network(chain: nn.Sequential, values: Tensor, scores: dict[str, Tensor]) -> Figure:
    """A chain of ``Linear`` and ``ReLU`` as a graph; connections are drawn by their relevance.

    ``values`` is one input [1, inputs], ``scores`` are of the weights. Values stand in the nodes,
    relevance beside the lines; dashed lines are negative.
    """
    layers, x = [values[0]], values
    for module, after in zip(chain, [*chain[1:], None], strict=True):
        x = module(x)
        if not isinstance(after, nn.ReLU):
            layers.append(x[0].detach())
    figure, axis = plt.subplots(figsize=(7.4, 3.1))
    top = max(len(layer) for layer in layers) - 1
    heights = [top / 2 + (len(n) - 1) / 2 - np.arange(len(n)) for n in layers]
    most = max(float(s.abs().max()) for s in scores.values())
    plain = {"fc": "white", "ec": "none", "pad": 0.6}
    for depth, score in enumerate(scores.values()):
        for (k, j), value in np.ndenumerate(score.numpy()):
            ends = heights[depth][j], heights[depth + 1][k]
            colour, line = (RED, "-") if value > 0 else (BLUE, "--")
            axis.plot([depth, depth + 1], ends, color=colour if value else "#cccccc", ls=line,
                      lw=0.8 + 5 * abs(value) / most, zorder=1)  # fmt: skip
            at = 0.26 + 0.16 * (k % 3)
            axis.text(depth + at, (1 - at) * ends[0] + at * ends[1], _signed(value), fontsize=8,
                      color=colour, ha="center", va="center", bbox=plain)  # fmt: skip
    for depth, (layer, places) in enumerate(zip(layers, heights, strict=True)):
        for value, height in zip(layer.tolist(), places, strict=True):
            axis.text(depth, height, _signed(value).lstrip("+"), ha="center", va="center", zorder=3,
                      bbox={"boxstyle": "circle,pad=0.35", "fc": "white", "ec": BLACK})  # fmt: skip
    axis.set(xlim=(-0.3, len(layers) - 0.7), ylim=(-0.6, top + 0.6), xticks=range(len(layers)))
    axis.set_xticklabels(["input", *["hidden, after ReLU"] * (len(layers) - 2), "logits"])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.grid(False)
    return figure


def _signed(value: float) -> str:
    """With its sign and two digits; what rounds to nothing is a plain zero."""
    return f"{value:+.2f}" if round(value, 2) else "0"


def agreement(known: Tensor, scores: dict[str, Tensor], xlabel: str) -> Figure:
    """Ranks (%) of 1,500 weights by two scores each [weights], a panel for each of ``scores``.

    The weights are drawn at random among those that have any relevance; lines part positive from
    negative scores.
    """
    live = (known != 0).nonzero().squeeze(1)
    chosen = live[torch.randperm(len(live), generator=torch.Generator().manual_seed(0))[:1500]]

    def ranks(values: Tensor) -> np.ndarray:  # equal scores share a rank
        return 100 * scipy.stats.rankdata(values[live]) / len(live)

    shown = torch.searchsorted(live, chosen)
    figure, axes = panels(len(scores), height=3.1, width=2.9)
    for axis, (name, values) in zip(axes, scores.items(), strict=True):
        same = (known[chosen] > 0) == (values[chosen] > 0)
        x, y = ranks(known)[shown], ranks(values)[shown]
        axis.scatter(x[same], y[same], s=4, color=BLUE, alpha=0.5, lw=0, label="same sign")
        axis.scatter(x[~same], y[~same], s=9, color=RED, marker="x", lw=0.7, label="other sign")
        for values_, line in ((known, axis.axvline), (values, axis.axhline)):
            line(100 * float((values_[live] <= 0).float().mean()), color=BLACK, lw=0.8, ls=":")
        axis.set(title=readable(name), xlabel=xlabel, xlim=(0, 100), ylim=(0, 100))
        axis.set_aspect("equal")
    axes[0].set_ylabel("rank by the rule (%)")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside right upper", markerscale=2)
    return figure


def whereabouts(tables: dict[str, pd.DataFrame]) -> Figure:
    """Where relevance is: with weights, taken by biases, or lost; without a leak it is 100 %.

    ``tables`` are of ``lessons.whereabouts``, by title.
    """
    figure, axes = panels(len(tables), height=3.2, width=3.7)
    kinds = {"weights": (BLUE, ""), "biases": (SKY, ".."), "lost": (RED, "xx")}
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        below = {1: np.zeros(len(table)), -1: np.zeros(len(table))}
        for kind, (colour, hatch) in kinds.items():
            shares = table[kind].to_numpy()
            for sign in (1, -1):
                part = np.where(sign * shares > 1e-4, shares, 0)
                axis.bar(table["layer"], part, bottom=below[sign], color=colour, hatch=hatch,
                         edgecolor="white", lw=0, label=kind if sign > 0 else None)  # fmt: skip
                below[sign] = below[sign] + part
        axis.axhline(100, color=BLACK, lw=1, ls="--")
        axis.set(title=title)
        axis.tick_params(axis="x", labelrotation=30)
    ends = [axis.get_ylim() for axis in axes]
    for axis in axes:  # the same for all, or they could not be compared
        axis.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
    axes[0].set_ylabel("relevance (% of the logits)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def rule_in_view(weight: Tensor, score: Tensor) -> Figure:
    """Ten units of a layer [units, ...], their relevance, and what ``score > 0`` leaves of them."""
    rows = {"weight": weight, "relevance": score, "what is left": weight * (score > 0)}
    figure = plt.figure(figsize=(0.95 * min(10, len(weight)) + 1.2, 3.2))
    grid(figure, {label: squares(values[:10]) for label, values in rows.items()})
    return figure


def activity(table: pd.DataFrame, title: str) -> Figure:
    """Mean activations, active units and what tells images apart, of ``lessons.activity``."""
    columns = ["mean activation", "active (%)", "variance between images (%)"]
    figure, axes = panels(len(columns), height=3.2, width=3.6)
    styles = [(GREY, "o", "-", 11), (RED, "X", "--", 7), (BLUE, "s", "-.", 5)]
    for axis, column in zip(axes, columns, strict=True):
        parts = table.groupby("network", sort=False)
        for (name, part), (colour, marker, line, size) in zip(parts, styles, strict=False):
            axis.plot(part["layer"], part[column], color=colour, marker=marker, ls=line, ms=size,
                      label=name)  # fmt: skip
        axis.set(ylabel=column)
        axis.tick_params(axis="x", labelrotation=40)
    axes[0].set(yscale="log", ylabel="mean activation (logarithmic)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(title)
    return figure


def snapping(row: Tensor, step: float, snapped: dict[float, Tensor]) -> Figure:
    """A row of weights [weights], and its symbols on a grid at different prices of a bit."""
    figure, axis = plt.subplots(figsize=(8, 0.62 * len(snapped) + 1.5))
    ends = int(max(symbols.abs().max() for symbols in snapped.values())) + 1
    for tick in range(-ends, ends + 1):
        axis.axvline(tick * step, color=BLACK if tick == 0 else GREY, lw=0.7, alpha=0.6)
    axis.plot(row, np.zeros(len(row)), "|", color=BLACK, ms=14, mew=1.6)
    labels = ["the weights"]
    for place, (price, symbols) in enumerate(snapped.items(), 1):
        for before, after in zip(row.tolist(), (step * symbols).tolist(), strict=True):
            axis.plot([before, after], [place - 0.55, place], color=SKY, lw=0.8)
        values, counts = symbols.unique(return_counts=True)
        axis.scatter(
            step * values, np.full(len(values), place), s=26 * counts, color=BLUE, zorder=3
        )
        labels.append(f"price {price:g}: {int((symbols == 0).sum())} of {len(row)} are zero")
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set(
        xlabel=f"weight (grid lines every {step:g}; a dot's area: how many weights land there)"
    )
    axis.grid(False)
    return figure


def tier_map(weight: Tensor, scores: Tensor, bits: Tensor, title: str) -> Figure:
    """Eight units and eight channels of a filter bank: weights, their scores and their bits.

    All are [units, channels, height, width]; scores are magnitudes of contrastive relevance.
    """
    figure, axes = panels(3, height=3.9, width=3.6)
    colours = ListedColormap(list(BITS.values()))
    norm = BoundaryNorm([-1, 1, 3, 6, 9], len(BITS))
    for axis, values in zip(axes, (weight, scores), strict=False):
        limit = float(values[:8, :8].abs().quantile(0.98)) or 1.0
        axis.imshow(_tiled(values), cmap=SIGNED, vmin=-limit, vmax=limit)
    axes[2].imshow(_tiled(bits.float()), cmap=colours, norm=norm, interpolation="none")
    for axis, said in zip(axes, ("weights", "|contrastive relevance|", "bits"), strict=True):
        axis.set(title=said, xlabel="input channels")
    axes[0].set_ylabel("units")
    bare(np.array(axes))
    found = {int(b) for b in bits.unique()}
    handles = [Patch(fc=c, ec=BLACK, label=f"{b} bits") for b, c in BITS.items() if b in found]
    figure.legend(handles=handles, loc="outside right upper")
    figure.suptitle(title)
    return figure


def _tiled(values: Tensor, most: int = 8) -> np.ndarray:
    """Kernels [units, channels, h, w] side by side, a gap between them."""
    if values.ndim == 2:
        return values[: 5 * most, : 5 * most].detach().numpy()
    part = nn.functional.pad(values[:most, :most].detach(), (0, 1, 0, 1), value=float("nan"))
    units, channels, height, width = part.shape
    return part.permute(0, 2, 1, 3).reshape(units * height, channels * width).numpy()


def depth(table: pd.DataFrame) -> Figure:
    """Bits per weight of each layer, of ``Study.bits_per_layer``; a panel for each network."""
    place = table.groupby(["dataset", "model", "recipe"], sort=False).cumcount() + 1
    figure = curves(
        table.assign(knob=place, seed=0), "knob", "bits",
        xlabel="layer, from the input", ylabel="bits per weight in the file",
    )  # fmt: skip
    for axis in figure.axes:
        axis.set_ylim(bottom=0)
    return figure
