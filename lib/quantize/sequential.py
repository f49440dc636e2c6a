"""Rate-distortion layer after layer: each takes back the errors of those before it."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import moments
from ..leastsquares import Equations
from ..lockstep import change_in_order, plan
from ..moments import Layer, weight_name
from ..progress import done
from ..prune import Removed
from ..score import criterion
from .codes import Codes, check, halved
from .ratedistortion import Problem, RateDistortion, rate_distortion
from .uniform import uniform


@dataclass(frozen=True)
class Sequential(RateDistortion):
    """Rate-distortion, layer after layer in the order of the forward pass.

    Each layer is refitted to give the dense network's outputs from its inputs in the network as
    coded so far, then coded for these inputs, then its bias is set. Where it ends a branch, it
    aims at the dense network's sum less what the coded network's other branch brings.

    Attributes
    ----------
    ridge : float
        Positive strength that ties the refitted weights to those they start from, relative to the
        mean diagonal of the inputs' second moment.

    Notes
    -----
    With a the inputs as coded so far and z the outputs wanted, for each layer in turn:

        w <- argmin Σ (wᵀ a + b - z)² + ρ ‖w - w⁰‖²,  ŵ = argmin G (w - ŵ)ᵀ H (w - ŵ) + λ bits,
        b <- mean(z - ŵᵀ a),

    H the covariance of a, G the weight of the unit's error. Layers that the forward pass calls
    several times, or whose inputs have no known moment, are stored in eight bits beforehand.

    References
    ----------
    Frantar, Alistarh: Optimal Brain Compression, NeurIPS 2022, section 6 (sequential solving).
    Li et al.: BRECQ, ICLR 2021, section 3.2, for blocks as the unit of what is wanted.
    """

    ridge: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.ridge < math.inf, f"ridge must be positive, not {self.ridge}")

    def prepare(self, removed: Removed, images: Tensor, labels: Tensor) -> Problem:
        """Weights of the units and the unit of damage; moments follow layer by layer."""
        units = criterion(self.by).units(removed.network, images, labels)
        return Problem({}, units, _damage(removed.network, images, units))

    def store(
        self, removed: Removed, prepared: Problem, images: Tensor
    ) -> tuple[nn.Module, dict[str, Codes]]:
        """Refit, code and correct layer after layer; see ``Quantizer.store``."""
        network, masks = copy.deepcopy(removed.network), removed.masks
        codes: dict[str, Codes] = {}
        weak: list[str] = []  # layers of whose inputs the images tell too little
        paths = {weight_name(path): path for path in plan(network, images[:2]).layers}
        with torch.no_grad():
            for name in masks.keys() - paths.keys():
                weight = network.get_parameter(name)
                codes[name] = uniform(weight, 8, mask=masks[name])
                weight.copy_(codes[name].decode())
                done(name)

        def change(path: str, layer: Layer, a: Tensor, z: Tensor, wanted: Tensor) -> None:
            name = weight_name(path)
            equations = Equations(layer, centre=layer.bias is not None)
            equations.add(a, wanted - z)
            if layer.bias is not None and moments.unsupported(equations.plain(), equations.images):
                weak.append(path)
            total = equations.missing[..., -1] + equations.outputs()  # of what is wanted
            equations.refit(masks[name], self.ridge)
            codes[name] = rate_distortion(
                layer.weight,
                second_moment=equations.moment(),
                unit_weight=prepared.units[name],
                lam=self.price * prepared.damage,
                mask=masks[name],
            )
            layer.weight.copy_(codes[name].decode())
            if layer.bias is not None:
                left = ((total - equations.outputs()) / equations.count).flatten()
                # as it will be stored, so that later layers see it
                layer.bias.copy_(halved(layer.bias + left.to(layer.bias.dtype)))
            done(name)

        names = {path for name, path in paths.items() if name in masks}
        change_in_order(removed.folded.network, network, images, names, change)
        if weak:
            moments.warn_of(weak, len(images))
        return network, {name: codes[name] for name in masks}


def _damage(network: nn.Module, images: Tensor, units: dict[str, Tensor]) -> float:
    """What removing all weights would do, weighed by units, divided by their number.

    It is the variance of each unit's outputs, or their second moment where no bias takes the mean:
    no moments of inputs are needed.
    """
    network = copy.deepcopy(network).eval()
    layers = moments.layers_of(network)
    sums = {name: torch.zeros(3, len(layer.weight)).double() for name, layer in layers.items()}

    def add(name: str, layer: Layer, inputs: tuple[Tensor], output: Tensor) -> None:
        z = moments.units_of(layer, output).double()  # [groups, rows, p]
        if layer.bias is not None:
            z = z - layer.bias.double().reshape(len(z), -1, 1)
        now = torch.stack([z.sum(2), z.square().sum(2), torch.ones_like(z).sum(2)])
        sums[name] += now.flatten(1).cpu()

    moments.watch(network, images, layers, add)
    total = weights = 0.0
    for name, (first, second, count) in sums.items():
        if bool(count.any()) and (unit := units.get(weight_name(name))) is not None:
            if layers[name].bias is not None:
                means = first.square() / count
                share = moments.borrowed(float(second.sum()), float(means.sum()), len(images))
                second = second - means + share * second
            total += float((second * unit.double().cpu()).sum()) / len(images)
            weights += layers[name].weight.numel()
    return total / max(1.0, weights) or 1.0
