"""Uniform grids: the same bits for all weights."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..codes import Codes, check, kept_weight, storable
from ..progress import each
from .quantizer import Quantizer

# clipping points tried, relative to the largest |weight|
CLIPS = torch.logspace(-1.2, 0, 80, dtype=torch.float32)


@dataclass(frozen=True)
class Uniform(Quantizer):
    """The same bits for all weights.

    Attributes
    ----------
    bits : float
        Width, rounded to an integer of [1, 8].
    """

    knob = "bits"
    settings = (8, 7, 6, 5, 4, 3, 2)
    bits: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.bits <= 8, f"bits must lie in [1, 8], not {self.bits}")

    def codes(
        self, weights: dict[str, Tensor], masks: dict[str, Tensor], prepared: Any
    ) -> dict[str, Codes]:
        """See ``uniform``."""
        return {n: uniform(w, round(self.bits), mask=masks[n]) for n, w in each(weights.items())}


def uniform(weight: Tensor, bits: int, *, mask: Tensor | None = None) -> Codes:
    """Quantize to a symmetric uniform grid of the step with the least squared error.

    Parameters
    ----------
    weight : Tensor
        Float weights of any shape.
    bits : int
        Width, 1 to 8. The symbols are the integers of [−(2^(bits−1) − 1), 2^(bits−1) − 1]; with
        one bit they are the signs −1 and 1, and only weights that are zero or masked get 0.
    mask : Tensor, optional
        bool, shaped like the weight, True = kept; the others decode to zero.

    Raises
    ------
    ValueError
        If the weight is not finite, the mask does not fit or the width is outside [1, 8].
    """
    weight = kept_weight(weight, mask)
    check(1 <= bits <= 8, f"bits must lie in [1, 8], not {bits}")
    step = best_step(weight.flatten(), largest(bits))
    return Codes(nearest(weight, step, largest(bits)).int(), step[None], "uniform")


def largest(bits: int) -> int:
    """Largest symbol of a width; 0 stands for the binary grid of signs."""
    return 2 ** (bits - 1) - 1


def best_step(weights: Tensor, top: int) -> Tensor:
    """Storable step of least squared error for weights [n] and symbols up to top.

    It is searched over clipping points, then alternated with the symbols, as in Lloyd's algorithm:
    for given symbols s the best step is Σ w s / Σ s².
    """
    best = limit = weights.abs().max()
    error = torch.tensor(math.inf)
    for clip in CLIPS:
        step = storable(limit * clip / max(1, top))
        trial = (weights - step * nearest(weights, step, top)).square().sum()
        best, error = torch.where(trial < error, step, best), torch.minimum(trial, error)
    for _ in range(5):
        symbols = nearest(weights, best, top)
        energy = symbols.square().sum()
        step = storable((weights * symbols).sum() / energy.clamp(min=1))
        best = torch.where(energy > 0, step, best)
    return torch.where(limit > 0, best, 1)


def nearest(weight: Tensor, step: Tensor, top: int) -> Tensor:
    """Nearest symbols up to top in magnitude, as floats."""
    return (weight / step).round().clamp(-top, top) if top else weight.sign()
