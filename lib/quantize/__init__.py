"""Quantizers: weights, and what they matter, to integer codes on a small grid.

Each is an object that owns its knob and the knob's range; all give the same :class:`Codes`, on the
CPU. Symbol 0 means a weight of exactly zero, so pruned weights stay zero by construction. Grids
hold float16 values because that is how they are stored; symbols are chosen on the rounded grid, so
storing it loses nothing. To add one, derive from :class:`Quantizer` and hand an object of it to
``Recipe(store=...)``.
"""

from ..codes import KINDS, Codes
from .ecqx import ECQx
from .quantizer import Quantizer
from .ratedistortion import RateDistortion, energy, rate_distortion
from .sequential import Sequential
from .tiers import Tiers, score_tiers, tier_shares
from .trained import Trained
from .uniform import Uniform, uniform
from .widths import LayerWidths, kmeans, layer_widths

__all__ = [
    "ECQx", "KINDS", "Codes", "LayerWidths", "Quantizer", "RateDistortion", "Sequential", "Tiers",
    "Trained", "Uniform", "energy", "kmeans", "layer_widths", "rate_distortion", "score_tiers",
    "tier_shares", "uniform",
]  # fmt: skip
