"""What rate-distortion weighs, and the size of a file that it would make at another price."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..linear import View
from .columns import cheapest, code_lengths

SAMPLE = 20_000  # weights of a layer from which its entropy is guessed


@dataclass(frozen=True)
class Problem:
    """What rate-distortion weighs bits against; see ``rate_distortion``."""

    moments: dict[str, Tensor]  # covariances of the layers' inputs: biases take the means
    units: dict[str, Tensor]  # weight of each output unit's squared error
    damage: float  # what removing all weights would do, divided by their number
    views: dict[str, View] = field(default_factory=dict)  # by which moments are ordered
    energies: dict[str, Tensor] = field(default_factory=dict)  # M_jj² of the file coded last


def scaled_size(
    price: float, network: nn.Module, problem: Problem, coded: Mapping[str, Any]
) -> Callable[[float], float]:
    """Bits by the price, from the codes, steps and energies of the file for one ``price``."""
    layers = []
    for name, energy in problem.energies.items():
        code, view = coded[name], problem.views[name]
        axes = [1] * (code.symbols.dim() - 1)
        step = code.grid.reshape(-1, *axes) if code.tiers is None else code.grid[code.tiers.long()]
        rows = view.rows(network.get_parameter(name).detach().cpu() / step)
        steps = view.rows(step.expand(code.symbols.shape))
        units = view.units(problem.units[name].cpu(), rows).reshape(view.groups, -1, 1)
        damage = energy[:, None] * units * steps**2 / (price * problem.damage)
        every = max(1, rows.numel() // SAMPLE)
        sample = rows.flatten()[::every], damage.flatten()[::every]
        layers.append((rows.numel(), *sample))

    def size(other: float) -> float:
        scale = (price / other) ** 0.5
        return sum(n * _entropy(scale * weights, damage) for n, weights, damage in layers)

    return size


def _entropy(scaled: Tensor, damage: Tensor) -> float:
    """Bits a weight of the codes of least damage + bits, without making up for errors."""
    limit = 2**14
    symbols = scaled.round().clamp(-limit, limit)
    top = int(symbols.abs().max()) + 1
    for _ in range(4):
        bits = code_lengths(symbols, top)
        symbols = cheapest(scaled, damage, bits)
    return float(code_lengths(symbols, top)[(symbols + top).long()].mean())
