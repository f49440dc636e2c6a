"""Tiers: weights with higher scores get more bits, as the paper asks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from ..progress import each
from ..prune import Removed
from ..score import By, Scores, criterion
from .codes import Codes, check, kept_weight, mask_like
from .quantizer import Quantizer
from .uniform import best_steps, largest, nearest


@dataclass(frozen=True)
class Tiers(Quantizer):
    """Classes of weights by score, over all layers; which class a weight is in is stored.

    Attributes
    ----------
    by : str or Criterion
        Decides the class.
    bits : float
        Mean width of the kept weights, positive.
    widths : tuple of int
        Bits of the tiers, ascending, the first 0: that of removed weights.
    """

    knob = "bits"
    settings = tuple(8 - step / 10 for step in range(61))
    by: By = "lrp-epsilon"
    bits: float = 4.0
    widths: tuple[int, ...] = (0, 2, 4, 8)

    def __post_init__(self) -> None:
        criterion(self.by)
        check(0 < self.bits <= 8, f"bits must lie in (0, 8], not {self.bits}")
        if self.widths[:1] != (0,) or list(self.widths) != sorted({*self.widths}):
            raise ValueError(f"widths must ascend from 0, not {self.widths}")
        if not len(self.widths) > 1 or self.widths[-1] > 8:
            raise ValueError(
                f"widths must hold one of 1 to 8 bits, and none above, not {self.widths}"
            )

    def prepare(self, removed: Removed, images: Tensor, labels: Tensor) -> Scores:
        """Scores of the network that is stored."""
        return removed.scores(self.by, images, labels)

    def codes(
        self, weights: dict[str, Tensor], masks: dict[str, Tensor], prepared: Scores
    ) -> dict[str, Codes]:
        """See ``tier_shares`` and ``score_tiers``."""
        shares = tier_shares(prepared, masks, self.widths, self.bits)
        return {
            n: score_tiers(w, prepared[n], widths=self.widths, shares=shares[n], mask=masks[n])
            for n, w in each(weights.items())
        }


def tier_shares(
    scores: dict[str, Tensor],
    masks: dict[str, Tensor],
    widths: tuple[int, ...],
    mean_bits: float,
) -> dict[str, list[float]]:
    """Share out tiers of bits by one ranking of all kept weights of a network.

    Parameters
    ----------
    scores, masks : dict of str to Tensor
        Scores, and bool masks of the weights to share among (True = kept).
    widths : tuple of int
        Bits of the tiers, ascending, the first 0: only removed weights are there.
    mean_bits : float
        Mean width of the kept weights; clipped to the range of the other widths.

    Returns
    -------
    dict of str to list of float
        For each tensor, the share of its kept weights in each tier, lowest scores first.

    Notes
    -----
    Of all shares with the given mean the flattest are taken, ``p_t ~ exp(theta * width_t)``
    (maximum entropy), so that one number says how many bits a network gets.
    """
    usable = np.array(widths[1:], dtype=float)

    def shares(theta: float) -> np.ndarray:
        weights = np.exp(theta * (usable - usable.mean()))
        return weights / weights.sum()

    mean_bits = float(np.clip(mean_bits, usable[0] + 1e-3, usable[-1] - 1e-3))
    parts = shares(brentq(lambda theta: shares(theta) @ usable - mean_bits, -20, 20))
    pooled = torch.cat([scores[name][mask] for name, mask in masks.items()]).sort().values
    ends = [round(len(pooled) * end) for end in np.cumsum(parts)[:-1]]
    limits = pooled[[min(end, len(pooled) - 1) for end in ends]] if len(pooled) else pooled
    result = {}
    for name, mask in masks.items():
        kept = scores[name][mask]
        below = [0.0, *((kept < limit).float().mean().item() for limit in limits), 1.0]
        result[name] = [0.0, *np.diff(below)] if len(kept) else [0.0] * len(parts) + [1.0]
    return result


def score_tiers(
    weight: Tensor,
    scores: Tensor,
    *,
    widths: Sequence[int] = (0, 2, 4, 8),
    shares: Sequence[float] | None = None,
    mask: Tensor | None = None,
) -> Codes:
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
    check(
        scores.shape == weight.shape,
        f"scores are {list(scores.shape)}, the weight is {list(weight.shape)}",
    )
    check(not scores.isnan().any(), "scores hold NaN")
    check(
        widths == sorted(widths) and widths[0] >= 0 and widths[-1] <= 8,
        f"widths must ascend within [0, 8], not {widths}",
    )
    check(
        len(shares) == len(widths) and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6,
        f"{len(widths)} widths take as many shares that sum to one, not {shares}",
    )
    places = kept.reshape(-1).nonzero().squeeze(1)
    order = places[scores.detach().cpu().reshape(-1)[places].argsort(stable=True)]
    ends = [round(len(order) * share) for share in np.cumsum(shares)[:-1]] + [len(order)]
    flat, tiers = weight.reshape(-1), torch.zeros(weight.numel(), dtype=torch.uint8)
    symbols, steps = torch.zeros(weight.numel(), dtype=torch.int32), torch.ones(len(widths)).float()
    for tier, members in enumerate(torch.tensor_split(order, ends[:-1])):
        tiers[members] = tier
        if widths[tier] and len(members):
            top = largest(widths[tier])
            steps[tier] = best_steps(flat[None, members], top)
            symbols[members] = nearest(flat[members], steps[tier], top).int()
    return Codes(symbols.reshape(weight.shape), steps, "tier", tiers.reshape(weight.shape))
