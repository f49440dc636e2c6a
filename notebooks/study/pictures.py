"""Pictures of networks: images, relevance, scores, files; returned as matplotlib figures."""

from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from .names import readable
from .palette import BLACK, BLUE, GREY, ORANGE, SIGNED, SKY, contrasting, panels


def before_and_after(compressed, before: float, after: float) -> Figure:
    """Bytes of each layer as float32 and in the file, and the accuracy of both networks.

    Parameters
    ----------
    compressed : Compressed
        The file's content.
    before, after : float
        Accuracies in percent.

    Returns
    -------
    Figure
    """
    table = pd.DataFrame(compressed.summary())
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3.2), layout="constrained", width_ratios=(3, 1)
    )
    place = np.arange(len(table))
    left.barh(place - 0.2, 4 * table["weights"], 0.4, color=GREY, label="float32")
    left.barh(place + 0.2, table["bytes"], 0.4, color=BLUE, label="in the file")
    left.set_yticks(place, table["layer"])
    left.invert_yaxis()
    left.set(xscale="log", xlabel="bytes", title="size")
    left.legend()
    right.bar(["before", "after"], [before, after], color=[GREY, BLUE], width=0.6)
    for column, value in enumerate((before, after)):
        right.text(column, value, f"{value:.1f} %", ha="center", va="bottom")
    right.set(ylim=(min(before, after) - 5, 101), title="test accuracy", ylabel="%")
    return figure


def file_bar(parts: dict[str, bytes], floats: int) -> Figure:
    """The bytes of a file in their order, by what they are for.

    Parameters
    ----------
    parts : dict of str to bytes
        By label, in the order of the file.
    floats : int
        Bytes of the float32 weights.

    Returns
    -------
    Figure
    """
    figure, axis = plt.subplots(figsize=(10, 2.3), layout="constrained")
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
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=9)
    return figure


def side_by_side(before: Tensor, after: Tensor, title: str, count: int = 12) -> Figure:
    """Units of a layer before and after, and each of its weights before against after.

    Parameters
    ----------
    before, after : Tensor
        [units, ...].
    title : str
        Of the figure.
    count : int
        Units shown.

    Returns
    -------
    Figure
    """
    count = min(count, len(before))
    figure = plt.figure(figsize=(0.75 * count + 4, 2.7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(0.75 * count, 3.2))
    axes = left.subplots(2, count, squeeze=False)
    for row, (label, values) in enumerate({"before": before, "after": after}.items()):
        for unit in range(count):
            signed(axes[row, unit], square(values[unit]))
        axes[row, 0].set_ylabel(label, rotation=0, ha="right", va="center")
    bare(axes)
    axis = right.subplots()
    axis.plot(before.flatten(), after.flatten(), ".", ms=3, color=BLUE, alpha=0.6)
    axis.set(xlabel="weight before", ylabel="weight after")
    figure.suptitle(title)
    return figure


def outputs(wanted: Tensor, found: dict[str, Tensor]) -> Figure:
    """A unit's outputs against what they were before a change, a panel for each change.

    Parameters
    ----------
    wanted : Tensor
        [images, 1].
    found : dict of str to Tensor
        By title, shaped like ``wanted``.

    Returns
    -------
    Figure
        With the root of the mean squared error in each title.
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


def histograms(scores: dict[str, Tensor], title: str = "") -> Figure:
    """Distribution of scores in each layer, parted where the paper's rule parts them: at zero.

    Parameters
    ----------
    scores : dict of str to Tensor
        Signed scores by the layers' titles.
    title : str
        Of the figure.

    Returns
    -------
    Figure
    """
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
        share, zero, beyond = (
            np.mean(values <= 0),
            np.mean(values == 0),
            np.mean(np.abs(values) > limit),
        )
        axis.text(0.03, 0.97, f"{share:.0%} removed,\n{zero:.0%} exactly 0", va="top",
                  transform=axis.transAxes, fontsize=8)  # fmt: skip
        axis.text(0.97, 0.97, f"{beyond:.0%} beyond\nthe edges", va="top", ha="right",
                  transform=axis.transAxes, fontsize=8)  # fmt: skip
        axis.set_ylim(top=30 * max(removed.max(), kept.max()))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                  fontsize=9)  # fmt: skip
    axes[0].set_ylabel("weights (logarithmic)")
    figure.suptitle(title)
    return figure


def heatmaps(images: Tensor, relevance: dict[str, Tensor], title: str = "") -> Figure:
    """Input images above their relevance, a row for each rule; red for, blue against the class.

    Parameters
    ----------
    images : Tensor
        [N, C, H, W].
    relevance : dict of str to Tensor
        By row label, each shaped like the images; channels are added up.
    title : str
        Of the figure.

    Returns
    -------
    Figure
    """
    rows, columns = len(relevance) + 1, len(images)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.15 * columns + 1, 1.2 * rows + 0.3), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for column, image in enumerate(images):
        low, high = image.amin(), image.amax()
        picture = ((image - low) / (high - low)).permute(1, 2, 0).numpy()
        axes[0, column].imshow(picture.squeeze(), cmap="gray")
        for row, values in enumerate(relevance.values(), 1):
            signed(axes[row, column], values[column].sum(0))
    for axis, label in zip(axes[:, 0], ["input", *map(readable, relevance)], strict=True):
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
    bare(axes)
    figure.suptitle(title)
    return figure


def bare(axes) -> None:
    """Take ticks, frames and grid from an array of axes that show images."""
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.grid(False)


def square(unit: Tensor) -> Tensor:
    """A unit's weights as an image: channels added up; a row as a square where it is one."""
    if unit.ndim > 1:
        return unit.sum(0)
    side = round(len(unit) ** 0.5)
    return unit.reshape(side, side) if side * side == len(unit) else unit[None]


def signed(axis, values: Tensor) -> None:
    """Show values [height, width], red above zero, blue below, white at zero."""
    limit = float(values.abs().max()) or 1.0
    axis.imshow(values.numpy(), cmap=SIGNED, vmin=-limit, vmax=limit)


def filters(weight: Tensor, relevance: Tensor, count: int = 12) -> Figure:
    """First-layer filters above the relevance of their weights, most relevant filter first.

    Parameters
    ----------
    weight, relevance : Tensor
        [filters, channels, height, width]; channels are added up. Or [units, inputs].
    count : int
        Filters shown at most.

    Returns
    -------
    Figure
    """
    order = relevance.flatten(1).sum(1).argsort(descending=True)[:count]
    figure, axes = plt.subplots(
        2, len(order), figsize=(0.9 * len(order) + 1, 2.2), layout="constrained", squeeze=False
    )
    for column, index in enumerate(order.tolist()):
        signed(axes[0, column], square(weight[index]))
        signed(axes[1, column], square(relevance[index]))
    for axis, label in zip(axes[:, 0], ("weight", "relevance"), strict=True):
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
    bare(axes)
    return figure


def samples(images: Tensor, titles: Iterable[object], title: str = "", columns: int = 10) -> Figure:
    """A row of images, each under what it is called.

    Parameters
    ----------
    images : Tensor
        [N, C, H, W].
    titles : iterable
        Of the images.
    title : str
        Of the figure.
    columns : int
        Images shown at most.

    Returns
    -------
    Figure
    """
    figure, axes = plt.subplots(1, columns, figsize=(1.05 * columns, 1.9), layout="constrained")
    for axis, image, said in zip(axes, images, titles, strict=False):
        low, high = image.amin(), image.amax()
        axis.imshow(((image - low) / (high - low)).permute(1, 2, 0).squeeze(), cmap="gray")
        axis.set_title(str(said), fontsize=9, weight="normal")
    bare(axes)
    figure.suptitle(title)
    return figure
