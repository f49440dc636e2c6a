"""Rate-distortion layer after layer: each takes back the errors of those before it."""

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import moments
from ..attention import opened, views_of
from ..codes import Codes, check, halved
from ..inputs import owners
from ..leastsquares import equations
from ..linear import Layer, Place, Projection, View, bias_of, layers_of, watch
from ..lockstep import Plan, change_in_order, plan
from ..patches import batched
from ..progress import done
from ..prune import Removed
from ..score import criterion
from .ratedistortion import RateDistortion, coded, warn_of_others
from .sizes import Problem
from .uniform import uniform

WIDE = 5000  # inputs of a linear layer beyond which they are coded in parts, one after the other
ENOUGH = 1000  # inputs of a unit by which a price's size is guessed
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

    H the covariance of a, G the weight of the unit's error. A linear layer of more than ``WIDE``
    inputs is coded in parts, each refitted to what those before it have left; H is that of the
    part. (LeNet-300 on MNIST in two parts takes 5 % more bytes at equal loss, in four 26 %.)
    Weights of layers that the forward pass calls several times, that several modules have, or
    whose inputs have no known moment, are stored in eight bits beforehand. A network that orders or
    chooses its tokens by learned scores may come to another order once it is coded; layers after
    that aim at outputs of other tokens, and all at once is the better choice.

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
        damage = _damage(removed.network, images, units)
        route = plan(opened(removed.network), images)
        return Problem({}, units, damage, views_of(removed.network), route)

    def expected(
        self, removed: Removed, prepared: Problem, images: Tensor
    ) -> Callable[[float], float]:
        """By the moments of inputs in the network before it is coded, which come near."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the file itself will warn
            seen = moments.input_moments(removed.network, images, centered=True, most=ENOUGH)
        return super().expected(removed, replace(prepared, moments=seen), images)

    def store(
        self, removed: Removed, prepared: Problem, images: Tensor
    ) -> tuple[nn.Module, dict[str, Codes]]:
        """Refit, code and correct layer after layer; see ``Quantizer.store``."""
        network, masks = copy.deepcopy(removed.network), removed.masks
        inside = opened(network)
        codes: dict[str, dict[int, Codes]] = {}  # of each weight, by the first of their rows
        weak: list[str] = []  # layers of whose inputs the images tell too little
        layers = layers_of(inside)
        assert prepared.route is not None
        places = _places(removed.network, {p: layers[p] for p in prepared.route.layers}, masks)
        shared = Counter(id(bias_of(layer)) for layer in layers.values())
        others = masks.keys() - {place.name for place in places.values()}
        warn_of_others(others, masks)
        with torch.no_grad():
            for name in others:
                weight = network.get_parameter(name)
                code = uniform(weight, 8, mask=masks[name])
                weight.copy_(code.decode())
                codes[name] = {0: code}
                done(name)

        def change(path: str, layer: Layer, a: Tensor, z: Tensor, wanted: Tensor) -> None:
            place = places[path]
            mask, units = place(masks[place.name]), place(prepared.units[place.name])
            made: list[Codes] = []
            bias, lam = bias_of(layer), self.price * prepared.damage
            bias = bias if shared[id(bias)] == 1 else None  # two layers' suits neither alone
            for part, inputs in parts_of(layer):
                problem = equations(part, bias is not None, bias is not None)
                problem.add(a if inputs is None else a[..., inputs], wanted - z)
                if bias is not None and moments.borrowed(*problem.energies(), len(images)):
                    weak.append(path)
                if bias is not None:
                    total = problem.missing[..., -1] + problem.outputs()  # of what is wanted
                kept = mask if inputs is None else mask[:, inputs]
                problem.refit(kept, self.ridge)
                weight, view = part.weight.detach(), View.of(part)
                finest = float(layer.weight.abs().max()) / 2**14
                step = max(finest, float(made[0].grid)) if made else None
                moment = problem.moment(len(images))
                made.append(coded(view, weight, kept, moment, units, lam, step))
                part.weight.copy_(made[-1].decode())
                if bias is not None:
                    left = ((total - problem.outputs()) / problem.count).flatten()
                    part.bias += left.to(part.bias.dtype)
                if inputs is not None:  # the next part makes up for what this one could not
                    z = layer.forward(a)
            if bias is not None:  # as it will be stored, so that later layers see it
                bias.copy_(halved(bias))
            whole = made[0]
            if len(made) > 1:
                whole = _on_one_grid(made)
                layer.weight.copy_(whole.decode())
            codes.setdefault(place.name, {})[place.first or 0] = whole
            if place.last in (None, len(masks[place.name])):
                done(place.name)

        route = Plan([*places], prepared.route.branch_ends)
        change_in_order(opened(removed.folded.network), inside, images, route, change)
        if weak:
            moments.warn_of(weak, len(images))
        rows = {name: [parts[first] for first in sorted(parts)] for name, parts in codes.items()}
        return network, {name: _stacked(rows[name]) for name in masks}


def _places(
    network: nn.Module, layers: dict[str, Layer], masks: dict[str, Tensor]
) -> dict[str, Place]:
    """Where the weights of these layers are stored, of those that they have for themselves.

    Not where another module has the weight too, nor where they are only some of its rows: of an
    attention whose keys are read otherwise from batch to batch, queries alone would be.
    """
    owned = owners(network)
    places = {path: Place.of(path, layer) for path, layer in layers.items()}
    rows: Counter[str] = Counter()
    for path, place in places.items():
        rows[place.name] += len(layers[path].weight)
    return {
        path: place
        for path, place in places.items()
        if place.name in masks
        and rows[place.name] == len(masks[place.name])
        and owned[id(network.get_parameter(place.name))] == 1
    }


def parts_of(layer: Any) -> list[tuple[Any, slice | None]]:
    """A layer, or one too wide for a second moment as layers of some of its inputs.

    They share its memory; a bias is shared by all.
    """
    width = getattr(layer, "in_features", 0)
    if not isinstance(layer, nn.Linear) or width <= WIDE:
        return [(layer, None)]
    size = math.ceil(width / math.ceil(width / WIDE))
    parts: list[tuple[Any, slice | None]] = []
    for first in range(0, width, size):
        inputs = slice(first, min(first + size, width))
        weight, bias = layer.weight.detach()[:, inputs], bias_of(layer)
        parts.append((Projection("", 0, weight, bias), inputs))
    return parts


def _on_one_grid(codes: list[Codes]) -> Codes:
    """Codes of a weight of which inputs were coded apart, on the coarsest of their grids.

    They differ where bits cost next to nothing, and the finest step that a weight may have is that
    of its largest part: a ten thousandth of it.
    """
    step = torch.cat([code.grid for code in codes]).max()
    symbols = torch.cat([(code.decode() / step).round() for code in codes], 1)
    return Codes(symbols.int(), step[None], "uniform")


def _stacked(codes: list[Codes]) -> Codes:
    """Codes of a weight of which rows were coded apart, one below the other."""
    if len(codes) == 1:
        return codes[0]
    symbols = torch.cat([code.symbols for code in codes])
    grid = torch.cat([code.grid for code in codes])
    if bool((grid == grid[0]).all()):
        return Codes(symbols, grid[:1], "uniform")
    each = [torch.full_like(code.symbols, tier) for tier, code in enumerate(codes)]
    tiers = torch.cat(each).to(torch.uint8)
    spans = (int(code.symbols.max() - code.symbols.min()) + 1 for code in codes)
    if sum(spans) > MAX_ALPHABET:
        return Codes(symbols, grid[tiers[:, 0].long()], "channel")  # stores a step for each row
    return Codes(symbols, grid, "tier", tiers)


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
            linear, size = isinstance(layer, nn.Linear), output.shape[-1]
            z = output.reshape(-1, size, 1) if linear else batched(layer, output).flatten(2)
            z = z.double()  # [images, units, positions]
            first, second = z.sum(2).sum(0), torch.linalg.vector_norm(z, dim=2).square().sum(0)
            count = torch.full_like(first, z.numel() / len(first))
            if layer.bias is not None:  # without it
                bias = layer.bias.double()
                second += bias * (count * bias - 2 * first)
                first -= count * bias
            now = torch.stack([first, second, count])  # [3, units]
        now = now.cpu()
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
