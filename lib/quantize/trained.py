"""Quantization-aware training: codes assigned anew while the network trains."""

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..finetune import finetune
from ..inputs import ready, split
from ..moments import Layer, hooked, input_moments, layers_of, patches_of, weight_name
from ..prune import Removed
from .codes import Codes, check
from .columns import cheapest, code_lengths
from .quantizer import Quantizer
from .ratedistortion import Problem, rd_step
from .sequential import Sequential
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


def input_means(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Mean patch [groups, d] that each layer with known inputs reads, by weight name."""
    network = copy.deepcopy(network).eval()
    sums: dict[str, list[Tensor]] = {}

    def add(path: str, layer: Layer, inputs: tuple[Tensor], output: Tensor) -> None:
        patches = patches_of(layer, inputs[0])
        sums.setdefault(weight_name(path), []).append(patches.sum(2))  # [groups, d + 1]

    with hooked(network, layers_of(network), add), torch.no_grad():
        for batch in split(images, 50):
            network(ready(batch, network))
    totals = {name: torch.stack(parts).sum(0) for name, parts in sums.items()}
    return {name: total[:, :-1] / total[:, -1:] for name, total in totals.items()}


@dataclass(frozen=True)
class InTraining(Quantizer):
    """What quantizers that train have in common; a subclass says how weights are assigned.

    Attributes
    ----------
    steps : int
        Of Adam, on ``lib.finetune.finetune``'s batches; a bit costs more and more over the first
        half of them.
    rate : float
        Learning rate at the start, in steps of each layer's grid: so a weight takes at least
        1 / rate steps to cross a cell, in networks of any scale.
    """

    trains: ClassVar[bool] = True
    steps: int = 1000
    rate: float = 0.005

    def __post_init__(self) -> None:
        check(self.steps > 0, f"steps must be positive, not {self.steps}")
        check(0 < self.rate < 1, f"rate must lie in (0, 1), not {self.rate}")

    def start(
        self, removed: Removed, prepared: Any, images: Tensor
    ) -> tuple[nn.Module, dict[str, Codes], dict[str, Grid]]:
        """A copy of the network, codes of weights that stay as they are, grids of all others."""
        raise NotImplementedError

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
        fixed = {name: network.get_parameter(name).detach().clone() for name in codes}
        for name, grid in grids.items():
            grid.start(network.get_parameter(name).detach())

        means = input_means(removed.network, images)
        biases = {name: f"{name.removesuffix('weight')}bias" for name in grids}

        def coded(step: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
            new = dict(fixed)
            for name, grid in grids.items():
                if step % EVERY == 0 or step == self.steps:
                    grid.assign(values[name], min(1.0, 2 * step / self.steps))
                new[name] = grid.symbols * grid.step
                if name in means and (bias := values.get(biases[name])) is not None:
                    rows = (values[name] - new[name]).reshape(
                        len(means[name]), -1, means[name][0].numel()
                    )
                    new[biases[name]] = bias + (rows @ means[name][..., None]).flatten()
            return new

        # gradients need no more than the ten bits of TF32, where there is such a thing
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            finetune(
                network, removed.masks, removed.train, steps=self.steps, lr=self.rate,
                seed=removed.seed, coded=coded,
                refresh=lambda: self.refresh(network, grids, prepared),
                scales={name.removesuffix("weight"): grid.step for name, grid in grids.items()},
            )  # fmt: skip
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
        Start from the network coded layer after layer, or from its weights as they are. The
        first suits deep networks, which rounding to the nearest would ruin at once; in the second
        more weights end at zero.

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

    coded: bool = True

    def __post_init__(self) -> None:
        InTraining.__post_init__(self)
        Sequential.__post_init__(self)

    def prepare(self, removed: Removed, images: Tensor, labels: Tensor) -> Problem:
        """What ``Sequential`` needs, and the moments of inputs in the uncoded network."""
        moments = input_moments(removed.network, images, centered=True)
        return replace(super().prepare(removed, images, labels), moments=moments)

    def start(
        self, removed: Removed, prepared: Problem, images: Tensor
    ) -> tuple[nn.Module, dict[str, Codes], dict[str, Grid]]:
        """Grids of all layers whose inputs have a known moment; the others get eight bits."""
        if self.coded:
            network, codes = Sequential.store(self, removed, prepared, images)
        else:
            network, codes = copy.deepcopy(removed.network), {}
        lam, grids = self.price * prepared.damage, {}
        for name, mask in removed.masks.items():
            weight = network.get_parameter(name).detach()
            if name not in prepared.moments:
                codes[name] = codes.get(name) or uniform(weight, 8, mask=mask)
                weight.copy_(codes[name].decode())
                continue
            moment, units = prepared.moments[name], prepared.units[name]
            code = codes.pop(name, None)
            step = float(code.grid) if code else rd_step(weight, moment, units, lam)
            energy = moment.diagonal(dim1=-2, dim2=-1).reshape(-1, 1, weight[0].numel())
            damage = step**2 * units.to(energy).reshape(len(energy), -1, 1) * energy
            grids[name] = Grid(
                step,
                math.ceil(1.5 * float(weight.abs().max()) / step) + 1,
                damage.reshape(weight.shape).to(weight),
                lam,
                mask.to(weight.device),
            )
        return network, codes, grids
