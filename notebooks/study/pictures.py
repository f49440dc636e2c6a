"""Pictures of networks: images, relevance, scores, files; returned as matplotlib figures."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from .figures import BLUE, GREY, panels


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


def histograms(scores: dict[str, Tensor], title: str = "") -> Figure:
    """Distribution of scores in each layer, with the half that the paper's rule removes shaded.

    Parameters
    ----------
    scores : dict of str to Tensor
        Signed scores.
    title : str
        Of the figure.

    Returns
    -------
    Figure
    """
    chosen = list(scores.items())
    chosen = chosen if len(chosen) <= 4 else [chosen[i] for i in (0, 1, len(chosen) // 2, -1)]
    figure, axes = panels(len(chosen), height=2.8, width=3.2)
    for axis, (name, score) in zip(axes, chosen, strict=True):
        values = score.flatten().numpy()
        limit = np.quantile(np.abs(values), 0.98) or 1.0
        bins = np.linspace(-limit, limit, 62)
        counts, _ = np.histogram(np.clip(values, -limit, limit), bins)
        removed = bins[1:] <= 1e-12 * limit
        axis.bar(bins[:-1], counts, np.diff(bins), align="edge",
                 color=np.where(removed, GREY, BLUE), alpha=0.85)  # fmt: skip
        axis.axvspan(-limit, 0, color=GREY, alpha=0.15, lw=0)
        axis.set_yscale("log")
        share = float((score <= 0).float().mean())
        axis.set(title=name, xlabel="relevance")
        axis.text(0.03, 0.94, f"{share:.0%} removed", transform=axis.transAxes, va="top")
    axes[0].set_ylabel("weights")
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
            _signed(axes[row, column], values[column].sum(0))
    for axis, label in zip(axes[:, 0], ["input", *relevance], strict=True):
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
    _bare(axes)
    figure.suptitle(title)
    return figure


def _bare(axes) -> None:
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.grid(False)


def _signed(axis, values: Tensor) -> None:
    limit = float(values.abs().max()) or 1.0
    axis.imshow(values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)


def filters(weight: Tensor, relevance: Tensor, count: int = 12) -> Figure:
    """First-layer filters above the relevance of their weights, most relevant filter first.

    Parameters
    ----------
    weight, relevance : Tensor
        [filters, channels, height, width]; channels are added up.
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
        _signed(axes[0, column], weight[index].sum(0))
        _signed(axes[1, column], relevance[index].sum(0))
    for axis, label in zip(axes[:, 0], ("weight", "relevance"), strict=True):
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
    _bare(axes)
    return figure


def samples(images: Tensor, labels: Tensor, columns: int = 10) -> Figure:
    """A row of images with their labels.

    Parameters
    ----------
    images, labels : Tensor
        [N, C, H, W] and int64 [N].
    columns : int
        Images shown at most.

    Returns
    -------
    Figure
    """
    figure, axes = plt.subplots(1, columns, figsize=(columns, 1.3), layout="constrained")
    for axis, image, label in zip(axes, images, labels.tolist(), strict=False):
        low, high = image.amin(), image.amax()
        axis.imshow(((image - low) / (high - low)).permute(1, 2, 0).squeeze(), cmap="gray")
        axis.set_title(str(label))
    _bare(axes)
    return figure
