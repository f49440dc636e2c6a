"""Tiers: weights with higher scores get more bits, as the paper asks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # of whose parts that of use is imported only where it is used
import torch
from torch import Tensor

from ..codes import Codes, check, kept_weight, mask_like
from ..progress import each
from ..prune import Removed
from ..score import By, Scores, criterion
from .quantizer import Quantizer
from .uniform import best_step, largest, nearest


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
        super().__post_init__()
        criterion(self.by)
        check(0 < self.bits <= 8, f"bits must lie in (0, 8], not {self.bits}")
        ascending = self.widths[:1] == (0,) and list(self.widths) == sorted({*self.widths})
        check(ascending, f"widths must ascend from 0, not {self.widths}")
        some = len(self.widths) > 1 and self.widths[-1] <= 8
        check(some, f"widths must hold one of 1 to 8 bits, and none above, not {self.widths}")

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
    scores: dict[str, Tensor], masks: dict[str, Tensor], widths: tuple[int, ...], mean_bits: float
) -> dict[str, list[float]]:
    """Share out tiers of bits by one ranking of all kept weights of a network.

    Widths ascend from 0, where only removed weights are; the mean width of the kept ones is
    clipped to the range of the others. Returned is, for each tensor, the share of its kept weights
    in each tier, lowest scores first. Of all shares with the given mean over the network these are
    the flattest (maximum entropy), ``p_t ~ exp(theta * width_t)``, so that one number says how
    many bits it gets.
    """
    usable = np.array(widths[1:], dtype=float)

    def shares(theta: float) -> np.ndarray:
        weights = np.exp(theta * (usable - usable.mean()))
        return weights / weights.sum()

    mean_bits = float(np.clip(mean_bits, usable[0] + 1e-3, usable[-1] - 1e-3))
    parts = shares(scipy.optimize.brentq(lambda theta: shares(theta) @ usable - mean_bits, -20, 20))
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
    weight: Tensor, scores: Tensor, *, widths: Sequence[int] = (0, 2, 4, 8),
    shares: Sequence[float] | None = None, mask: Tensor | None = None,
) -> Codes:  # fmt: skip
    """Quantize weights with higher scores to more bits: k tiers by rank of score.

    Weights, float, real scores and the bool mask, True = kept, are shaped alike. Widths are the
    bits of each tier, ascending, 0 to 8, see :func:`uniform`; 0 removes a weight, and those that
    the mask removes are zeros of the first tier. Shares are those of the kept weights in each
    tier, lowest scores first, summing to one, equal by default; counted from a ranking of all
    layers they give tiers of the whole network. ValueError if an input is not finite, shapes
    differ, widths or shares are unusable.

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
    shapes = f"{list(scores.shape)}, the weight is {list(weight.shape)}"
    check(scores.shape == weight.shape, f"scores are {shapes}")
    check(not scores.isnan().any(), "scores hold NaN")
    ascending = widths == sorted(widths) and widths[0] >= 0 and widths[-1] <= 8
    check(ascending, f"widths must ascend within [0, 8], not {widths}")
    usable = len(shares) == len(widths) and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6
    check(usable, f"{len(widths)} widths take as many shares that sum to one, not {shares}")
    places = kept.flatten().nonzero().squeeze(1)
    order = places[scores.detach().cpu().flatten()[places].argsort(stable=True)]
    ends = [round(len(order) * share) for share in np.cumsum(shares)[:-1]]
    flat, steps = weight.flatten(), torch.ones(len(widths), dtype=torch.float32)
    symbols, tiers = torch.zeros_like(flat, dtype=torch.int32), torch.zeros_like(flat).byte()
    for tier, members in enumerate(torch.tensor_split(order, ends)):
        tiers[members] = tier
        if widths[tier] and len(members):
            top = largest(widths[tier])
            steps[tier] = best_step(flat[members], top)
            symbols[members] = nearest(flat[members], steps[tier], top).int()
    return Codes(symbols.reshape(weight.shape), steps, "tier", tiers.reshape(weight.shape))
