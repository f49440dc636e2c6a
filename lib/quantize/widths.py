"""One integer width for each layer, weights shared by k-means: how the XAI baseline stores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codes import Codes, check, kept_weight, mask_like
from ..progress import each
from ..prune import Removed
from ..score import By, criterion
from .quantizer import Quantizer
from .uniform import best_step

WIDTHS = (1, 2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class LayerWidths(Quantizer):
    """One integer width for each layer by importance, k-means weight sharing.

    Attributes
    ----------
    by : str or Criterion
        A layer's importance is the mean absolute score of its weights.
    bits : float
        Most bits a weight on average, in [1, 8].

    References
    ----------
    Sabih, Hannig, Teich, arXiv:2008.09072.
    """

    knob = "bits"
    settings = tuple(8 - step / 10 for step in range(71))
    by: By = "deeplift"
    bits: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        criterion(self.by)
        check(1 <= self.bits <= 8, f"bits must lie in [1, 8], not {self.bits}")

    def prepare(self, removed: Removed, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Importance of each layer; zero for those without a score, which nothing uses."""
        scores = removed.scores(self.by, images, labels)
        found = {name: float(score.abs().mean()) for name, score in scores.items()}
        return dict.fromkeys(removed.masks, 0.0) | found

    def codes(
        self, weights: dict[str, Tensor], masks: dict[str, Tensor], prepared: dict[str, float]
    ) -> dict[str, Codes]:
        """See ``layer_widths`` and ``kmeans``."""
        numel = {name: weight.numel() for name, weight in weights.items()}
        widths = layer_widths(prepared, numel, self.bits, WIDTHS)
        return {n: kmeans(w, widths[n], mask=masks[n]) for n, w in each(weights.items())}


def kmeans(weight: Tensor, bits: int, *, mask: Tensor | None = None) -> Codes:
    """Share weights: a codebook of at most 2^bits values besides zero, 1 to 8 bits, by k-means.

    Arguments and errors as of :func:`uniform`. The values ascend after the zero in front; kept
    weights go to the nearest value, which may be the zero.

    Notes
    -----
    Lloyd's algorithm minimises Σ_i (w_i − c_{s_i})² with one value held at zero, started at the
    best uniform levels, so that no randomness enters. More than 2^16 different weights are
    clustered as 2^14 bins, each at its mean.

    References
    ----------
    Han, Mao, Dally: Deep Compression, ICLR 2016, eq. 2, section 3 (linear initialisation).
    """
    kept, weight = mask_like(weight, mask), kept_weight(weight, mask)
    check(1 <= bits <= 8, f"bits must lie in [1, 8], not {bits}")
    points, counts = _histogram(weight[kept].double())
    top = 2 ** (bits - 1)
    levels = torch.arange(-top, top + 1) * best_step(weight.flatten(), top).double()
    few = points.count_nonzero() <= 2 * top
    levels = (points if few else _lloyd(points, counts, levels)).half().float()
    values = levels[levels != 0].unique()
    grid = torch.cat([torch.zeros(1).to(values), values])
    ascending, order = grid.sort()
    place = torch.bucketize(weight, (ascending[1:] + ascending[:-1]) / 2)
    return Codes(order[place].int() * kept, grid, "codebook")


def layer_widths(
    importance: dict[str, float], numel: dict[str, int], mean_bits: float,
    choices: Sequence[int] = (2, 3, 4, 5, 6, 8),
) -> dict[str, int]:  # fmt: skip
    """Choose one integer width for each layer by importance, Σ widths·numel ≤ mean_bits·Σ numel.

    The importance, non-negative, is what a squared error of one of the layer's weights costs,
    ``numel`` the number of its weights, ``choices`` are the permitted widths. ValueError if the
    names differ, an importance is negative or not finite, or even the least widths exceed the
    mean.

    Notes
    -----
    A layer of importance h at b bits costs h·4^−b a weight. From the least width on, the widening
    that spares most a bit, h (4^−b − 4^−b') / (b' − b), is carried out as long as it fits; a layer
    whose next widening does not fit any more stays.

    References
    ----------
    Shoham, Gersho: Efficient bit allocation for an arbitrary set of quantizers, IEEE TASSP 1988.
    Sabih, Hannig, Teich, arXiv:2008.09072: integer widths for layers by importance; the rule is
    not public to us, this one is our reading.
    """
    widths = sorted(choices)
    check(importance.keys() == numel.keys(), "importance and numel must name the same layers")
    for name, value in importance.items():
        check(0 <= value < math.inf, f"importance of {name!r} is {value}")
    left = math.floor(mean_bits * sum(numel.values()) + 1e-6) - widths[0] * sum(numel.values())
    check(left >= 0, f"a mean of {mean_bits} bits is below the least width, {widths[0]}")
    gains = [
        (-float(value) * (4.0**-low - 4.0**-high) / (high - low), low, order, name, high)
        for order, (name, value) in enumerate(importance.items())
        for low, high in zip(widths, widths[1:], strict=False)
    ]
    chosen = dict.fromkeys(importance, widths[0])
    for _, low, _, name, high in sorted(gains):
        if chosen[name] == low and (high - low) * numel[name] <= left:
            left -= (high - low) * numel[name]
            chosen[name] = high
    return chosen


def _lloyd(points: Tensor, counts: Tensor, levels: Tensor) -> Tensor:
    """Ascending levels [k] of least squared error for counted points [n]; level zero stays."""
    fixed = levels == 0
    for _ in range(100):
        place = torch.bucketize(points, (levels[1:] + levels[:-1]) / 2)
        total = torch.bincount(place, counts, len(levels))
        means = torch.bincount(place, counts * points, len(levels)) / total
        means = torch.where(fixed | (total == 0), levels, means)
        if torch.equal(means, levels):
            break
        levels = means
    return levels


def _histogram(values: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct values and how often each is there; many are merged to bins at their means."""
    points, counts = values.unique(return_counts=True)
    if len(points) <= 2**16:
        return points, counts
    low, high = points[0], points[-1]
    place = ((values - low) / (high - low) * (2**14 - 1)).round().long()
    counts = torch.bincount(place)
    return torch.bincount(place, values)[counts > 0] / counts[counts > 0], counts[counts > 0]
