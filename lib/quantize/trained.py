"""Quantization-aware training: codes assigned anew while the network trains."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attention import opened, views_of
from ..codes import Codes, check
from ..finetune import finetune
from ..linear import Layer, Place, bias_of, layers_of, watch
from ..moments import input_moments
from ..patches import patches_of
from ..prune import Removed
from .columns import cheapest, code_lengths
from .quantizer import Quantizer
from .ratedistortion import RateDistortion
from .sequential import Sequential
from .sizes import Problem

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
    symbols : Tensor
        Those assigned last, from whose distribution the next take their bits.
    """

    step: float
    top: int
    damage: Tensor
    lam: float
    kept: Tensor
    zero: Tensor | None = None
    symbols: Tensor = field(init=False)

    def start(self, weight: Tensor) -> None:
        """Round every weight to its nearest symbol."""
        self.symbols = (weight / self.step).round().clamp(-self.top, self.top) * self.kept

    def assign(self, weight: Tensor, share: float) -> None:
        """Choose the symbols of least cost, a bit at this share of its cost."""
        bits = share * self.lam * code_lengths(self.symbols, self.top)
        self.symbols = cheapest(weight / self.step, self.damage, bits, self.zero) * self.kept


def _put(places: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        places[name].copy_(value)


def input_means(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Mean patch [groups, d] that each layer with known inputs reads, by weight name."""
    layers = layers_of(network := opened(network))
    biased = [path for path, layer in layers.items() if bias_of(layer) is not None]
    sums: dict[str, Tensor] = {}

    def add(path: str, layer: Layer, inputs: tuple[Tensor], output: Tensor) -> None:
        total = patches_of(layer, inputs[0]).sum(2)  # [groups, d + 1]
        sums[path] = sums[path] + total if path in sums else total

    watch(network, images, biased, add)
    means: dict[str, list[Tensor]] = {}
    for path, total in sums.items():
        name = Place.of(path, layers[path]).name
        means.setdefault(name, []).append(total[:, :-1] / total[:, -1:])
    return {name: torch.cat(parts) for name, parts in means.items()}


def _scales(network: nn.Module, grids: dict[str, Grid]) -> dict[str, float]:
    """What a parameter's learning rate is in units of, by name.

    The step of its layer's grid; where there is none, the root mean square of what its module
    holds.
    """
    steps = {name: grid.step for name, grid in grids.items()}
    steps |= {f"{name.removesuffix('weight')}bias": step for name, step in steps.items()}
    for path, module in network.named_modules():
        held = {f"{path}.{n}".lstrip("."): p for n, p in module.named_parameters(recurse=False)}
        if missing := held.keys() - steps.keys():
            values = torch.cat([p.detach().flatten() for p in held.values()])
            steps |= dict.fromkeys(missing, float(values.square().mean().sqrt()))
    return steps


@dataclass(frozen=True)
class InTraining(Quantizer, ABC):
    """What quantizers that train have in common; a subclass says how weights are assigned.

    Attributes
    ----------
    steps : int
        Of Adam, on ``lib.finetune.finetune``'s batches; a bit costs more and more over the first
        half of them.
    rate : float
        Learning rate at the start, in steps of each layer's grid: so a weight takes at least
        1 / rate steps to cross a cell, in networks of any scale. What has no grid moves in units
        of its module's root mean square.
    bfloat16 : bool
        Compute the gradients in bfloat16, which saves half the time on processors that multiply it.
    """

    trains: ClassVar[bool] = True
    steps: int = 1000
    rate: float = 0.015
    bfloat16: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.steps > 0, f"steps must be positive, not {self.steps}")
        check(0 < self.rate < 1, f"rate must lie in (0, 1), not {self.rate}")

    @abstractmethod
    def start(
        self, removed: Removed, prepared: Any, images: Tensor
    ) -> tuple[nn.Module, dict[str, Codes], dict[str, Grid]]:
        """A copy of the network, codes of weights that stay as they are, grids of all others."""

    def refresh(self, network: nn.Module, grids: dict[str, Grid], prepared: Any) -> None:
        """Look at the network as coded, every tenth of the steps; by default nothing changes."""

    def store(
        self, removed: Removed, prepared: Any, images: Tensor
    ) -> tuple[nn.Module, dict[str, Codes]]:
        """Train with coded weights, gradients passed straight through; see ``Quantizer.store``.

        With them go biases that make up for the mean of what the codes change: without
        BatchNorm, thousands of weights assigned anew at once would shift every layer.
        """
        assert removed.train is not None
        network, codes, grids = self.start(removed, prepared, images)
        values = {name: p.detach() for name, p in network.named_parameters()}  # as they change
        fixed = {name: code.decode().to(values[name]) for name, code in codes.items()}
        for name, grid in grids.items():
            grid.start(values[name])
        means, views = input_means(removed.network, images), views_of(removed.network)

        def coded(step: int) -> dict[str, Tensor]:
            new = dict(fixed)
            for name, grid in grids.items():
                if step % EVERY == 0 or step == self.steps:
                    grid.assign(values[name], min(1.0, 2 * step / self.steps))
                new[name] = grid.symbols * grid.step
                bias = name.removesuffix("weight") + "bias"
                if name in means and bias in values:
                    mean = means[name][..., None]  # [groups, d, 1]
                    rows = views[name].rows(values[name] - new[name])
                    new[bias] = values[bias] + (rows @ mean).flatten()
            return new

        @contextmanager
        def holding_codes(step: int) -> Iterator[None]:
            new = coded(step)
            behind = {name: values[name].clone() for name in new}
            _put(values, new)
            if step % max(1, self.steps // 10) == 0:
                self.refresh(network, grids, prepared)
            yield
            _put(values, behind)

        # gradients need no more than the ten bits of TF32, where there is such a thing
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            finetune(
                network, removed.masks, removed.train, steps=self.steps, lr=self.rate,
                seed=removed.seed, within=holding_codes,
                scales=_scales(network, grids), bfloat16=self.bfloat16,
            )  # fmt: skip
        _put(values, coded(self.steps))
        for name, grid in grids.items():
            step = torch.tensor([grid.step], dtype=torch.float32)
            codes[name] = Codes(grid.symbols.int(), step, "uniform")
        return network, {name: codes[name] for name in removed.masks}


@dataclass(frozen=True)
class Trained(InTraining, Sequential):
    """Rate-distortion inside quantization-aware training.

    Each weight is assigned, again and again, to the code of least damage + price x bits; the loss
    is computed with the codes, and its gradients move the weights behind them.

    Attributes
    ----------
    coded : bool
        Start from the network coded layer after layer rather than from its weights as they are,
        which ends with more zeros.

    Notes
    -----
    For weight j of unit k, w_kj behind its code Δ s and p the distribution of the symbols before:

        s_kj = argmin_s  G_k H_jj (w_kj − Δ s)² − λ log2 p(s)

    with G, H, λ and Δ of ``Sequential``, H of the uncoded network. Errors are not compensated
    any more: the gradients do that.

    References
    ----------
    Wiedemann et al.: Entropy-Constrained Training of Deep Neural Networks, IJCNN 2019. Bengio et
    al. 2013 (arXiv 1308.3432), section 4 (straight-through estimator).
    """

    coded: bool = False

    def prepare(self, removed: Removed, images: Tensor, labels: Tensor) -> Problem:
        """What ``Sequential`` needs, and the moments of inputs in the uncoded network."""
        seen = input_moments(removed.network, images, centered=True)
        problem = super().prepare(removed, images, labels)
        return replace(problem, moments=seen, views=views_of(removed.network))

    def start(
        self, removed: Removed, prepared: Problem, images: Tensor
    ) -> tuple[nn.Module, dict[str, Codes], dict[str, Grid]]:
        """Grids of all layers whose inputs have a known moment; the others get eight bits.

        In-projections coded in parts stay as they are coded.
        """
        network = copy.deepcopy(removed.network)
        if self.coded:
            network, codes = Sequential.store(self, removed, prepared, images)
        else:
            weights = {name: network.get_parameter(name).detach() for name in removed.masks}
            codes = RateDistortion.codes(self, weights, removed.masks, prepared)
        lam, grids = self.price * prepared.damage, {}
        for name in [n for n in codes if n in prepared.moments and codes[n].kind == "uniform"]:
            weight, step = network.get_parameter(name).detach(), float(codes.pop(name).grid)
            view = prepared.views[name]
            energy = prepared.moments[name].diagonal(dim1=-2, dim2=-1)  # [d] or [groups, d]
            energy = energy.reshape(view.groups, 1, view.inputs)
            units = view.units(prepared.units[name].to(energy), view.rows(weight))
            damage = units.reshape(view.groups, -1, 1) * energy
            grids[name] = Grid(
                step,
                math.ceil(1.5 * float(weight.abs().max()) / step) + 1,
                view.weight(step**2 * damage, weight.shape).to(weight),
                lam,
                removed.masks[name].to(weight.device),
            )
        return network, codes, grids
