"""Quantization-aware training: codes assigned anew while the network trains."""

import copy
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..finetune import finetune
from ..prune import Removed
from .codes import Codes, check, storable
from .columns import cheapest, code_lengths
from .quantizer import Quantizer
from .ratedistortion import Problem, RateDistortion, rd_step
from .uniform import uniform

EVERY = 4  # steps between assignments


@dataclass
class Grid:
    """Where one tensor's weights are assigned to, and at what cost.

    Attributes
    ----------
    step : float
        Of the grid, representable in float16.
    top : int
        Largest symbol.
    damage : Tensor
        Cost of an error of one step, shaped like the weight or [1].
    lam : float
        Cost of a bit.
    kept : Tensor
        bool, shaped like the weight; the others are zero.
    zero : Tensor, optional
        Factor of the cost of symbol zero, shaped like the weight.
    symbols : Tensor, optional
        Those assigned last, from whose distribution the next take their bits.
    """

    step: float
    top: int
    damage: Tensor
    lam: float
    kept: Tensor
    zero: Tensor | None = None
    symbols: Tensor | None = field(default=None, init=False)

    def assign(self, weight: Tensor, share: float) -> None:
        """Choose the symbols of least cost, a bit at this share of its cost."""
        scaled = weight / self.step
        before = scaled.round().clamp(-self.top, self.top) if self.symbols is None else self.symbols
        bits = share * self.lam * code_lengths(before, self.top)
        self.symbols = cheapest(scaled, self.damage, bits, self.zero) * self.kept

    def decoded(self) -> Tensor:
        """The weights that the symbols stand for."""
        assert self.symbols is not None
        return self.symbols * self.step


@dataclass(frozen=True)
class InTraining(Quantizer):
    """What quantizers that train have in common; a subclass says how weights are assigned.

    Attributes
    ----------
    steps : int
        Optimiser steps, see ``lib.finetune.finetune``; a bit costs more and more over the first
        half of them.
    optimiser : str
        A key of ``lib.finetune.OPTIMISERS``.
    """

    trains: ClassVar[bool] = True
    steps: int = 1000
    optimiser: str = "adam"

    def __post_init__(self) -> None:
        check(self.steps > 0, f"steps must be positive, not {self.steps}")

    def grids(self, network: nn.Module, masks: dict[str, Tensor], prepared: Any) -> dict[str, Grid]:
        """The grid of each weight that is assigned in training, on the network's device."""
        raise NotImplementedError

    def refresh(self, network: nn.Module, grids: dict[str, Grid], prepared: Any) -> None:
        """Look at the network as coded, every tenth of the steps; by default nothing changes."""

    def store(
        self, removed: Removed, prepared: Any, images: Tensor
    ) -> tuple[nn.Module, dict[str, Codes]]:
        """Train with coded weights, gradients passed straight through; see ``Quantizer.store``."""
        assert removed.train is not None
        network, masks = copy.deepcopy(removed.network), removed.masks
        grids = self.grids(network, masks, prepared)
        codes = {
            name: uniform(network.get_parameter(name), 8, mask=masks[name])
            for name in masks.keys() - grids.keys()
        }
        fixed = {name: code.decode().to(images.dtype) for name, code in codes.items()}

        def coded(step: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
            if step % EVERY == 0 or step == self.steps:
                for name, grid in grids.items():
                    grid.assign(weights[name], min(1.0, 2 * step / self.steps))
            return {name: grid.decoded() for name, grid in grids.items()} | fixed

        # gradients need no more than the ten bits of TF32, where there is such a thing
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            finetune(
                network, masks, removed.train, steps=self.steps, optimiser=self.optimiser,
                seed=removed.seed, coded=coded,
                refresh=lambda: self.refresh(network, grids, prepared),
            )  # fmt: skip
        for name, grid in grids.items():
            step = torch.tensor([grid.step], dtype=torch.float32)
            assert grid.symbols is not None
            codes[name] = Codes(grid.symbols.int(), step, "uniform")
        return network, {name: codes[name] for name in masks}


@dataclass(frozen=True)
class Trained(InTraining, RateDistortion):
    """Rate-distortion inside quantization-aware training.

    Each weight is assigned, again and again, to the code of least damage + price x bits; the loss
    is computed with the codes, and its gradients move the weights behind them.

    Notes
    -----
    For weight j of unit k, w_kj behind its code Δ s and p the distribution of the symbols before:

        s_kj = argmin_s  G_k H_jj (w_kj − Δ s)² − λ log2 p(s)

    with G, H, λ and Δ of ``rate_distortion``, those of the network before training. Errors are
    not compensated: the gradients do that.

    References
    ----------
    Wiedemann et al.: Entropy-Constrained Training of Deep Neural Networks, IJCNN 2019. Bengio et
    al. 2013 (arXiv 1308.3432), section 4 (straight-through estimator).
    """

    def __post_init__(self) -> None:
        InTraining.__post_init__(self)
        RateDistortion.__post_init__(self)

    def grids(
        self, network: nn.Module, masks: dict[str, Tensor], prepared: Problem
    ) -> dict[str, Grid]:
        """Step and damage of each layer whose inputs have a known moment."""
        grids = {}
        for name in sorted(masks.keys() & prepared.moments.keys()):
            weight, moment = network.get_parameter(name).detach(), prepared.moments[name]
            units, lam = prepared.units[name], self.price * prepared.damage
            step = rd_step(weight, moment, units, lam)
            energy = moment.diagonal(dim1=-2, dim2=-1).reshape(-1, 1, weight[0].numel())
            damage = units.to(energy).reshape(len(energy), -1, 1) * energy  # [groups, units, d]
            grids[name] = Grid(
                step,
                math.ceil(1.5 * float(weight.abs().max()) / step) + 1,
                (step**2 * damage).reshape(weight.shape).to(weight),
                lam,
                masks[name].to(weight.device),
            )
        return grids


def symmetric(weight: Tensor, bits: int) -> tuple[float, int]:
    """Step and largest symbol of the grid of 2^bits − 1 values that spans a tensor's weights."""
    top = 2 ** (bits - 1) - 1
    largest = float(weight.abs().max()) or 1.0
    return float(storable(torch.tensor(largest / top, dtype=torch.float32))), top
