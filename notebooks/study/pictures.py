"""Pictures of networks: images, relevance, scores, files; returned as matplotlib figures."""

from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Patch
from torch import Tensor

from .names import readable
from .palette import BLACK, BLUE, GREY, ORANGE, SIGNED, SKY, contrasting, panels


def before_and_after(compressed, before: float, after: float) -> Figure:
    """Bytes of each layer as float32 and in the file, and the accuracy (%) of both networks."""
    table = pd.DataFrame(compressed.summary())
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(3, 1))
    place = np.arange(len(table))
    left.barh(place - 0.2, 4 * table["weights"], 0.4, color=GREY, label="float32")
    left.barh(place + 0.2, table["bytes"], 0.4, color=BLUE, label="in the file")
    left.set_yticks(place, table["layer"])
    left.invert_yaxis()
    left.set(xscale="log", xlabel="bytes (logarithmic)", title="size")
    left.legend(fontsize=10)
    right.bar(["before", "after"], [before, after], color=[GREY, BLUE], width=0.6)
    for column, value in enumerate((before, after)):
        right.text(column, value, f"{value:.1f} %", ha="center", va="bottom")
    right.set(ylim=(0, 112), title="test accuracy", ylabel="%")
    return figure


def file_bar(parts: dict[str, bytes], floats: int) -> Figure:
    """The bytes of a file in their order, by label; ``floats`` is the size of float32 weights."""
    figure, axis = plt.subplots(figsize=(10, 2.3))
    at, total = 0, sum(map(len, parts.values()))
    kinds = {"weight": [BLUE, SKY], "bias": [ORANGE], "": [BLACK]}
    for place, (label, part) in enumerate(parts.items()):
        kind = next(kind for kind in kinds if label.endswith(kind))
        colour = kinds[kind][place // 2 % len(kinds[kind])]
        axis.barh(0, len(part), left=at, color=colour, edgecolor="white", lw=0.5)
        if len(part) > 0.05 * total:
            axis.text(at + len(part) / 2, 0, f"{label}\n{len(part):,}", ha="center", va="center",
                      color=contrasting(colour), fontsize=9)  # fmt: skip
        at += len(part)
    axis.set(yticks=[], xlim=(0, total), xlabel=f"bytes ({total:,}; as float32: {floats:,})")
    axis.grid(False)
    said = {"weights, layers in turn": BLUE, "biases": ORANGE, "header, checksum": BLACK}
    handles = [Patch(fc=colour, label=label) for label, colour in said.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def outputs(wanted: Tensor, found: dict[str, Tensor]) -> Figure:
    """A unit's outputs [images, 1] against what they were before a change, and their error (RMS).

    ``found`` holds them by title, a panel for each change.
    """
    figure, axes = panels(len(found), height=2.9, width=3.2)
    ends = [float(wanted.min()), float(wanted.max())]
    for axis, (title, values), marker in zip(axes, found.items(), "xo", strict=False):
        values = values.detach()
        error = float((values - wanted).square().mean().sqrt())
        axis.plot(wanted, values, marker, ms=3, color=BLUE, alpha=0.6)
        axis.plot(ends, ends, color="black", lw=0.8, ls=":")
        axis.set(title=f"{title}: error {error:.2f}", xlabel="output of the whole unit")
    axes[0].set_ylabel("output now")
    return figure


def histograms(scores: dict[str, Tensor], title: str) -> Figure:
    """Signed scores of up to four layers, by title, parted where the paper's rule does: at zero."""
    chosen = list(scores.items())
    chosen = chosen if len(chosen) <= 4 else [chosen[i] for i in (0, 1, len(chosen) // 2, -1)]
    figure, axes = panels(len(chosen), height=2.9, width=3.2)
    for axis, (name, score) in zip(axes, chosen, strict=True):
        values = score.flatten().numpy()
        limit = np.quantile(np.abs(values), 0.98) or 1.0
        bins = np.linspace(0, limit, 31)
        # each side for itself: a score of exactly zero is removed, and lies left of zero
        removed = np.histogram(-values[values <= 0], bins)[0]
        kept = np.histogram(values[values > 0], bins)[0]
        axis.bar(-bins[1:], removed, limit / 30, align="edge", color=GREY, hatch="//",
                 edgecolor="white", lw=0, label="removed: relevance ≤ 0")  # fmt: skip
        axis.bar(bins[:-1], kept, limit / 30, align="edge", color=BLUE,
                 label="kept: relevance > 0")  # fmt: skip
        axis.axvline(0, color="black", lw=0.8)
        axis.set(yscale="log", title=name, xlabel="relevance", xlim=(-limit, limit))
        zero, beyond = np.mean(values == 0), np.mean(np.abs(values) > limit)
        gone = np.mean(values <= 0)
        said = {"left": f"{100 * gone:.0f} % removed,\n{100 * zero:.0f} % exactly 0",
                "right": f"{100 * beyond:.0f} % beyond\nthe edges"}  # fmt: skip
        for x, (side, each) in zip((0.03, 0.97), said.items(), strict=True):
            axis.text(x, 0.97, each, va="top", ha=side, transform=axis.transAxes, fontsize=8)
        axis.set_ylim(top=30 * max(removed.max(), kept.max()))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    axes[0].set_ylabel("weights (logarithmic)")
    figure.suptitle(title)
    return figure


def grid(figure: FigureBase, rows: dict[str, Sequence[Tensor]]) -> np.ndarray:
    """Images side by side, a labelled row for each entry; gives the axes.

    Images [channels, height, width] are shown as they are, values [height, width] red above zero,
    blue below, white at zero.
    """
    axes = figure.subplots(len(rows), len(next(iter(rows.values()))), squeeze=False)
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            if image.ndim == 3:
                low, high = image.amin(), image.amax()
                axis.imshow(((image - low) / (high - low)).permute(1, 2, 0).squeeze(), cmap="gray")
            else:
                limit = float(image.abs().max()) or 1.0
                axis.imshow(image, cmap=SIGNED, vmin=-limit, vmax=limit)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    bare(axes)
    return axes


def bare(axes: np.ndarray) -> None:
    """Take ticks, frames and grid from axes that show images."""
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.grid(False)


def squares(units: Iterable[Tensor]) -> list[Tensor]:
    """Weights of units as images: channels added up; a row as a square where it is one."""
    found = []
    for unit in units:
        side = round(len(unit) ** 0.5) if unit.ndim == 1 else 0
        shape = (side, side) if side * side == len(unit) else (1, -1)
        found.append(unit.sum(0) if unit.ndim > 1 else unit.reshape(shape))
    return found


def side_by_side(before: Tensor, after: Tensor, title: str) -> Figure:
    """Twelve units of a layer [units, ...] before and after, and each weight against itself."""
    count = min(12, len(before))
    figure = plt.figure(figsize=(0.75 * count + 4, 2.7))
    left, right = figure.subfigures(1, 2, width_ratios=(0.75 * count, 3.2))
    grid(left, {"before": squares(before[:count]), "after": squares(after[:count])})
    axis = right.subplots()
    axis.plot(before.flatten(), after.flatten(), ".", ms=3, color=BLUE, alpha=0.6)
    axis.set(xlabel="weight before", ylabel="weight after")
    figure.suptitle(title)
    return figure


def heatmaps(images: Tensor, relevance: dict[str, Tensor]) -> Figure:
    """Images [N, C, H, W] above their relevance, a row for each rule; red for, blue against.

    Relevance is shaped like the images; its channels are added up.
    """
    rows = {"input": images} | {readable(name): each.sum(1) for name, each in relevance.items()}
    figure = plt.figure(figsize=(1.15 * len(images) + 1, 1.2 * len(rows) + 0.3))
    grid(figure, rows)
    return figure


def filters(weight: Tensor, relevance: Tensor) -> Figure:
    """The twelve most relevant filters [units, ...] of a layer above their weights' relevance."""
    order = relevance.flatten(1).sum(1).argsort(descending=True)[:12]
    figure = plt.figure(figsize=(0.9 * len(order) + 1, 2.2))
    grid(figure, {"weight": squares(weight[order]), "relevance": squares(relevance[order])})
    return figure


def samples(images: Tensor, titles: Sequence[object], title: str = "") -> Figure:
    """A row of images [N, C, H, W], as many as there are titles."""
    figure = plt.figure(figsize=(1.05 * len(titles), 1.9))
    (row,) = grid(figure, {"": images[: len(titles)]})
    for axis, said in zip(row, titles, strict=True):
        axis.set_title(str(said), fontsize=9, weight="normal")
    figure.suptitle(title)
    return figure
