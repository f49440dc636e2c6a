"""Relevance for every weight of a neural network, and compression by it.

To read first: ``compress`` (remove -> repair -> quantize -> file), then ``score`` (images to
scores), then ``prune`` (scores to masks). The rooms, each using only those above it:

- ``warning``, ``fields``, ``files``, ``progress``, ``inputs``, ``checks``: what users give, checked
- ``codes``, ``codec``: codes to a checked file and back
- ``batchnorm``, ``dense``, ``fold``: BatchNorm folded once on entry, unfolded once at the end
- ``linear``, ``patches``, ``attention``, ``moments``, ``leastsquares``, ``lockstep``: layers as
  linear maps
- ``relevance``, ``baselines``, ``score``: images to scores
- ``finetune``, ``masks``, ``prune``: scores to masks
- ``repair``, ``quantize``: what is kept is repaired, and coded by what it matters
- ``recipe``, ``search``, ``advice``, ``compress``: the one pipeline
- ``onnx_int8``, ``onnx``: decoded networks for other runtimes
"""

from .codec import Compressed, CompressedFileError
from .compress import compress
from .onnx import run_onnx, to_onnx
from .prune import KeepFilters, KeepTop, NonPositive, Removal
from .quantize import LayerWidths, Quantizer, RateDistortion, Sequential, Tiers, Uniform
from .recipe import RECIPES, Recipe, Repair
from .relevance import UnsupportedLayerError, input_relevance, unit_sensitivity, weight_relevance
from .score import CRITERIA, Criterion

__all__ = [
    "CRITERIA", "RECIPES", "Compressed", "CompressedFileError", "Criterion", "KeepFilters",
    "KeepTop", "LayerWidths", "NonPositive", "Quantizer", "RateDistortion", "Recipe", "Removal",
    "Repair", "Sequential", "Tiers", "Uniform", "UnsupportedLayerError", "compress",
    "input_relevance", "run_onnx", "to_onnx", "unit_sensitivity", "weight_relevance",
]  # fmt: skip
