"""Quantizers that see weights and scores alone: uniform grids, tiers, weight sharing, widths."""

import math

import numpy as np
import torch
from torch import Tensor

from lib.quantize.codes import Codes, check, kept_weight, mask_like, storable

CLIPS = torch.logspace(-1.2, 0, 80)  # clipping points tried, relative to the largest |weight|


def uniform(weight: Tensor, bits: int, *, mask: Tensor | None = None,
            per_channel: bool = False) -> Codes:
    """Quantize to a symmetric uniform grid of the step with the least squared error.

    Parameters
    ----------
    weight : Tensor
        Float weights; the first dimension is the output channel.
    bits : int
        Width, 1 to 8. The symbols are the integers of [−(2^(bits−1) − 1), 2^(bits−1) − 1]; with
        one bit they are the signs −1 and 1, and only weights that are zero or masked get 0.
    mask : Tensor, optional
        bool, shaped like the weight, True = kept; the others decode to zero.
    per_channel : bool
        One step for each output channel instead of one for the tensor.

    Returns
    -------
    Codes
        Of kind "uniform" or "channel".

    Raises
    ------
    ValueError
        If the weight is not finite, the mask does not fit or the width is outside [1, 8].

    Notes
    -----
    The step is searched over clipping points, then alternated with the symbols, as in Lloyd's
    algorithm: for given symbols s the best step is Σ w s / Σ s².
    """
    weight = kept_weight(weight, mask)
    check(1 <= bits <= 8, f"bits must lie in [1, 8], not {bits}")
    rows = weight.reshape(len(weight), -1) if per_channel else weight.reshape(1, -1)
    steps = _best_steps(rows, _largest(bits))
    symbols = _nearest(rows, steps[:, None], _largest(bits)).reshape(weight.shape)
    return Codes(symbols.int(), steps, "channel" if per_channel else "uniform")


def score_tiers(weight: Tensor, scores: Tensor, *, widths=(0, 2, 4, 8), shares=None,
                mask: Tensor | None = None) -> Codes:
    """Quantize weights with higher scores to more bits: k tiers by rank of score.

    Parameters
    ----------
    weight : Tensor
        Float weights.
    scores : Tensor
        Real, shaped like the weight.
    widths : sequence of int
        Bits of each tier, ascending, 0 to 8; see :func:`uniform`. Width 0 removes the weight.
    shares : sequence of float, optional
        Share of the kept weights in each tier, lowest scores first, summing to one; equal shares
        by default. Shares counted from a ranking of all layers give tiers of the whole network.
    mask : Tensor, optional
        bool, shaped like the weight, True = kept; the others are put in tier 0 as zeros.

    Returns
    -------
    Codes
        Of kind "tier". Each tier has the step of least squared error.

    Raises
    ------
    ValueError
        If an input is not finite, shapes differ, widths or shares are unusable.

    Notes
    -----
    Tier t holds the ranks from round(n·(p_0 + … + p_{t−1})) to round(n·(p_0 + … + p_t)) of the n
    kept weights; equal scores are ranked by position, the later ones higher.

    References
    ----------
    Soroush, Raji, Ghavami, arXiv:2507.05286, abstract: the higher a weight's score, the more bits
    it gets. The number of tiers, their widths and shares are our reading.
    """
    kept = mask_like(weight, mask)
    weight, widths = kept_weight(weight, mask), list(widths)
    shares = [1 / len(widths)] * len(widths) if shares is None else list(shares)
    check(scores.shape == weight.shape, f"scores are {list(scores.shape)}, the weight is "
           f"{list(weight.shape)}")
    check(not scores.isnan().any(), "scores hold NaN")
    check(widths == sorted(widths) and widths[0] >= 0 and widths[-1] <= 8,
           f"widths must ascend within [0, 8], not {widths}")
    check(len(shares) == len(widths) and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6,
           f"{len(widths)} widths take as many shares that sum to one, not {shares}")
    places = kept.reshape(-1).nonzero().squeeze(1)
    order = places[scores.detach().cpu().reshape(-1)[places].argsort(stable=True)]
    ends = [round(len(order) * share) for share in np.cumsum(shares)[:-1]] + [len(order)]
    flat, tiers = weight.reshape(-1), torch.zeros(weight.numel(), dtype=torch.uint8)
    symbols, steps = torch.zeros(weight.numel(), dtype=torch.int32), torch.ones(len(widths))
    for tier, members in enumerate(torch.tensor_split(order, ends[:-1])):
        tiers[members] = tier
        if widths[tier] and len(members):
            top = _largest(widths[tier])
            steps[tier] = _best_steps(flat[None, members], top)
            symbols[members] = _nearest(flat[members], steps[tier], top).int()
    return Codes(symbols.reshape(weight.shape), steps, "tier", tiers.reshape(weight.shape))


def kmeans(weight: Tensor, bits: int, *, mask: Tensor | None = None,
           importance: Tensor | None = None) -> Codes:
    """Share weights: a codebook by k-means, plain or weighted by importance.

    Parameters
    ----------
    weight : Tensor
        Float weights.
    bits : int
        Width, 1 to 8: at most 2^bits values besides zero.
    mask : Tensor, optional
        bool, shaped like the weight, True = kept; the others decode to zero.
    importance : Tensor, optional
        Non-negative, shaped like the weight: what a squared error of each weight costs.

    Returns
    -------
    Codes
        Of kind "codebook"; the values ascend after the zero in front. Kept weights go to the
        nearest value, which may be the zero.

    Raises
    ------
    ValueError
        If an input is not finite or does not fit, or the width is outside [1, 8].

    Notes
    -----
    Lloyd's algorithm minimises Σ_i h_i (w_i − c_{s_i})² with one value held at zero, started at
    the best uniform levels, so that no randomness enters. More than 2^16 different weights
    are clustered as 2^14 bins, each at its weighted mean.

    References
    ----------
    Han, Mao, Dally: Deep Compression, ICLR 2016, eq. 2, section 3 (linear initialisation).
    Sabih, Hannig, Teich, arXiv:2008.09072: centroids weighted by DeepLIFT importance; that the
    importance is the weight of the squared error is our reading.
    """
    kept, weight = mask_like(weight, mask), kept_weight(weight, mask)
    check(1 <= bits <= 8, f"bits must lie in [1, 8], not {bits}")
    cost = torch.ones_like(weight) if importance is None else importance.detach().float().cpu()
    check(cost.shape == weight.shape, f"importance is {list(cost.shape)}, the weight is "
           f"{list(weight.shape)}")
    check(bool((cost >= 0).all() & cost.isfinite().all()), "importance is negative or not finite")
    cost = cost + 1e-6 * cost.mean() if cost.any() else torch.ones_like(weight)
    points, masses = _histogram(weight[kept].double(), cost[kept].double())
    top = 2 ** (bits - 1)
    levels = torch.arange(-top, top + 1) * _best_steps(weight.reshape(1, -1), top).double()
    few = points.count_nonzero() <= 2 * top
    levels = (points if few else _lloyd(points, masses, levels)).half().float()
    values = levels[levels != 0].unique()
    grid = torch.cat([torch.zeros(1), values])
    ascending, order = grid.sort()
    nearest = torch.bucketize(weight, (ascending[1:] + ascending[:-1]) / 2)
    return Codes(order[nearest].int() * kept, grid, "codebook")


def layer_widths(importance: dict[str, float], numel: dict[str, int], mean_bits: float,
                 choices=(2, 3, 4, 5, 6, 8)) -> dict[str, int]:
    """Choose one integer width for each layer by importance.

    Parameters
    ----------
    importance : dict of float
        Non-negative, what a squared error of one of the layer's weights costs.
    numel : dict of int
        Number of weights of the same layers.
    mean_bits : float
        Most bits a weight on average over the network.
    choices : sequence of int
        Permitted widths.

    Returns
    -------
    dict of int
        A width for each layer, Σ widths·numel ≤ mean_bits·Σ numel.

    Raises
    ------
    ValueError
        If the names differ, an importance is negative or not finite, or even the least widths
        exceed the mean.

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
    gains = [(-float(value) * (4.0**-low - 4.0**-high) / (high - low), low, order, name, high)
             for order, (name, value) in enumerate(importance.items())
             for low, high in zip(widths, widths[1:], strict=False)]
    chosen = dict.fromkeys(importance, widths[0])
    for _, low, _, name, high in sorted(gains):
        if chosen[name] == low and (high - low) * numel[name] <= left:
            left -= (high - low) * numel[name]
            chosen[name] = high
    return chosen


def _lloyd(points, masses, levels):
    """Ascending levels [k] of least weighted squared error for points [n]; level zero stays."""
    fixed = levels == 0
    for _ in range(100):
        place = torch.bucketize(points, (levels[1:] + levels[:-1]) / 2)
        total = torch.bincount(place, masses, len(levels))
        means = torch.bincount(place, masses * points, len(levels)) / total
        means = torch.where(fixed | (total == 0), levels, means)
        if torch.equal(means, levels):
            break
        levels = means
    return levels


def _histogram(values, masses):
    """Distinct values with their masses; many are merged to bins at their weighted means."""
    points, place = values.unique(return_inverse=True)
    if len(points) > 2**16:
        low, high = points[0], points[-1]
        place = ((values - low) / (high - low) * (2**14 - 1)).round().long()
    total = torch.bincount(place, masses)
    points = torch.bincount(place, masses * values)[total > 0] / total[total > 0]
    return points, total[total > 0]


def _largest(bits):
    """Largest symbol of a width; 0 stands for the binary grid of signs."""
    return 2 ** (bits - 1) - 1


def _best_steps(rows, top):
    """Storable steps [r] of least squared error for rows of weights [r, n], symbols up to top."""
    largest = rows.abs().amax(1, keepdim=True)
    best, error = largest, torch.full_like(largest, math.inf)
    for clip in CLIPS:
        step = storable(largest * clip / max(1, top))
        trial = (rows - step * _nearest(rows, step, top)).square().sum(1, keepdim=True)
        best, error = torch.where(trial < error, step, best), torch.minimum(trial, error)
    for _ in range(5):
        symbols = _nearest(rows, best, top)
        energy = symbols.square().sum(1, keepdim=True)
        step = storable((rows * symbols).sum(1, keepdim=True) / energy.clamp(min=1))
        best = torch.where(energy > 0, step, best)
    return torch.where(largest > 0, best, 1).squeeze(1)


def _nearest(weight, step, top):
    """Nearest symbols up to top in magnitude, as floats."""
    return (weight / step).round().clamp(-top, top) if top else weight.sign()
