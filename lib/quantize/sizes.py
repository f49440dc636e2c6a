"""What rate-distortion weighs, and the size of a file that it would make at a price."""

import math
from dataclasses import dataclass, field

from torch import Tensor

from ..linear import View
from ..lockstep import Plan
from .columns import cheapest, code_lengths

SAMPLE = 4000  # weights of a layer from which its entropy is guessed


@dataclass(frozen=True)
class Problem:
    """What rate-distortion weighs bits against; see ``rate_distortion``."""

    moments: dict[str, Tensor]  # covariances of the layers' inputs: biases take the means
    units: dict[str, Tensor]  # weight of each output unit's squared error
    damage: float  # what removing all weights would do, divided by their number
    views: dict[str, View] = field(default_factory=dict)  # by which moments are ordered
    route: Plan | None = None  # in which layers are coded, where it is one after the other


@dataclass(frozen=True)
class Sample:
    """Some weights of a layer, from which the size of its codes is guessed.

    ``damage`` is what an error of one does, G_k M_jj², ``cost`` the mean of that without damping.
    """

    weights: int  # of the layer
    values: Tensor
    damage: Tensor
    cost: float
    largest: float

    def bits(self, lam: float) -> float:
        """Of the codes of least damage + lam · bits, without making up for errors."""
        step = step_of(lam, self.cost, self.largest)
        scaled, damage = self.values / step, self.damage * step**2 / lam
        symbols, top = scaled.round(), math.ceil(self.largest / step) + 1
        for _ in range(4):
            bits = code_lengths(symbols, top)
            symbols = cheapest(scaled, damage, bits)
        return self.weights * float(code_lengths(symbols, top)[(symbols + top).long()].mean())


def step_of(lam: float, cost: float, largest: float) -> float:
    """Step that suits the price lam of a bit; see ``rate_distortion``."""
    step = math.sqrt(6 * lam / (cost * math.log(2))) if cost > 0 else math.inf
    return min(max(step, largest / 2**14), 2.01 * largest)
