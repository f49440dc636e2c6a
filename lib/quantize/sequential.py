"""Rate-distortion layer after layer: each takes back the errors of those before it."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import moments
from ..leastsquares import equations
from ..linear import Layer, Place, View, bias_of, layers_of, opened, units_of, views_of, watch
from ..lockstep import change_in_order, plan
from ..progress import done
from ..prune import Removed
from ..score import criterion
from .codes import Codes, check, halved
from .ratedistortion import Problem, RateDistortion, coded
from .uniform import uniform

MAX_ALPHABET = 2**16  # symbols of all tiers together that a file can hold


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
        check(self.ridge > 0, f"ridge must be positive, not {self.ridge}")

    def prepare(self, removed: Removed, images: Tensor, labels: Tensor) -> Problem:
        """Weights of the units and the unit of damage; moments follow layer by layer."""
        units = criterion(self.by).units(removed.network, images, labels)
        damage = _damage(removed.network, images, units)
        return Problem({}, units, damage, views_of(removed.network))

    def store(
        self, removed: Removed, prepared: Problem, images: Tensor
    ) -> tuple[nn.Module, dict[str, Codes]]:
        """Refit, code and correct layer after layer; see ``Quantizer.store``."""
        network, masks = copy.deepcopy(removed.network), removed.masks
        view = opened(network)
        codes: dict[str, dict[int, Codes]] = {}  # of each weight, by the first of their rows
        weak: list[str] = []  # layers of whose inputs the images tell too little
        layers = layers_of(view)
        places = {path: Place.of(path, layers[path]) for path in plan(view, images[:2]).layers}
        places = {path: place for path, place in places.items() if place.name in masks}
        with torch.no_grad():
            for name in masks.keys() - {place.name for place in places.values()}:
                weight = network.get_parameter(name)
                code = uniform(weight, 8, mask=masks[name])
                weight.copy_(code.decode())
                codes[name] = {0: code}
                done(name)

        def change(path: str, layer: Layer, a: Tensor, z: Tensor, wanted: Tensor) -> None:
            place, bias = places[path], bias_of(layer)
            mask, units = place(masks[place.name]), place(prepared.units[place.name])
            problem = equations(layer, centre=bias is not None)
            problem.add(a, wanted - z)
            if bias is not None and moments.unsupported(problem.plain(), problem.images):
                weak.append(path)
            if bias is not None:
                total = problem.missing[..., -1] + problem.outputs()  # of what is wanted
            problem.refit(mask, self.ridge)
            lam = self.price * prepared.damage
            code = coded(View.of(layer), layer.weight.detach(), mask, problem.moment(), units, lam)
            codes.setdefault(place.name, {})[place.first or 0] = code
            layer.weight.copy_(code.decode())
            if bias is not None:
                left = ((total - problem.outputs()) / problem.count).flatten()
                # as it will be stored, so that later layers see it
                bias.copy_(halved(bias + left.to(bias.dtype)))
            if place.last in (None, len(masks[place.name])):
                done(place.name)

        change_in_order(opened(removed.folded.network), view, images, set(places), change)
        if weak:
            moments.warn_of(weak, len(images))
        return network, {name: _joined(codes[name]) for name in masks}


def _joined(parts: dict[int, Codes]) -> Codes:
    """Codes of a weight whose rows were coded in parts, each on a grid of its own."""
    if len(parts) == 1:
        return parts[0]
    codes = [parts[first] for first in sorted(parts)]
    symbols, grid = (torch.cat([getattr(c, field) for c in codes]) for field in ("symbols", "grid"))
    tiers = torch.cat([torch.full_like(c.symbols, i) for i, c in enumerate(codes)]).to(torch.uint8)
    if sum(int(c.symbols.max() - c.symbols.min()) + 1 for c in codes) <= MAX_ALPHABET:
        return Codes(symbols, grid, "tier", tiers)
    return Codes(symbols, grid[tiers[:, 0].long()], "channel")  # which takes a step for each row


def _damage(network: nn.Module, images: Tensor, units: dict[str, Tensor]) -> float:
    """What removing all weights would do, weighed by units, divided by their number.

    It is the variance of each unit's outputs, or their second moment where no bias takes the mean:
    no moments of inputs are needed.
    """
    network = opened(network)
    layers = layers_of(network)
    sums: dict[str, Tensor] = {}

    def add(path: str, layer: Layer, inputs: tuple[Tensor], output: Tensor) -> None:
        if isinstance(layer, nn.Embedding):  # its units are its rows
            z = inputs[0].new_zeros(3, len(layer.weight), dtype=torch.float64)
            squares = output.double().square().sum(-1).flatten()
            now = z.index_add_(1, inputs[0].flatten(), torch.stack([0 * squares, squares, squares]))
        else:
            z = units_of(layer, output).double()  # [groups, rows, p]
            if layer.bias is not None:
                z = z - layer.bias.double().reshape(len(z), -1, 1)
            now = torch.stack([z.sum(2), z.square().sum(2), torch.ones_like(z).sum(2)])
        now = now.flatten(1).cpu()
        sums[path] = sums[path] + now if path in sums else now

    watch(network, images, layers, add)
    total = weights = 0.0
    for path, (first, second, count) in sums.items():
        layer, place = layers[path], Place.of(path, layers[path])
        if (unit := units.get(place.name)) is not None:
            if bias_of(layer) is not None:
                means = first.square() / count
                share = moments.borrowed(float(second.sum()), float(means.sum()), len(images))
                second = second - means + share * second
            total += float((second * place(unit).double().cpu()).sum()) / len(images)
            weights += layer.weight.numel()
    return total / max(1.0, weights) or 1.0
