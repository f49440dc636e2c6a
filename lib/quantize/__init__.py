"""Quantizers: weights, and what they matter, to integer codes on a small grid.

Every quantizer returns the same :class:`Codes`, on the CPU. Symbol 0 means a weight of exactly
zero, so pruned weights stay zero by construction. Grids hold float16 values because that is how
they are stored; symbols are chosen on the rounded grid, so storing it loses nothing.
"""

from lib.quantize.codes import KINDS, Codes
from lib.quantize.ratedistortion import energy, rate_distortion, rd_step
from lib.quantize.scalar import kmeans, layer_widths, score_tiers, uniform

__all__ = [
    "KINDS", "Codes", "energy", "kmeans", "layer_widths", "rate_distortion", "rd_step",
    "score_tiers", "uniform",
]  # fmt: skip
