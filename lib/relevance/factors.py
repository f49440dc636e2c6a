"""Factors: activations that share the relevance of a product by a rule of their own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import UnsupportedLayerError
from .layers import Activate

Many = Sequence[Tensor]

# What a gate is for an input of zero, and what moves it from there, without the rounding of a
# difference. One that rests at zero (tanh) is a signal until a shift is added to it.
RESTING: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "sigmoid": (0.5, lambda x: (x / 2).tanh() / 2),
    "hardsigmoid": (0.5, lambda x: F.hardtanh(x / 6, -0.5, 0.5)),
    "tanh": (0.0, torch.tanh),
    "erf": (0.0, torch.erf),
}


@dataclass(frozen=True)
class Gate:
    """The output of a sigmoid, or what shifts, factors and another shape made of it.

    Attributes
    ----------
    value : Tensor
        As propagated, whatever becomes of it.
    moved : Tensor
        The same values; relevance reaches the sigmoid's input x by what moves the gate away from
        its rest, ``(σ(x) - σ(0)) / x``, which is bounded where ``σ(x) / x`` is not.
    rest : Tensor
        What it would be for x = 0.
    """

    value: Tensor
    moved: Tensor
    rest: Tensor

    @classmethod
    def of(cls, x: Tensor, value: Tensor, name: str) -> "Gate":
        """A function of ``RESTING``, applied to x."""
        at_zero, moves = RESTING[name]
        with torch.no_grad():
            moved = moves(x)
        rest = torch.full_like(x, at_zero)
        return cls(value, Activate.apply(x, moved) + rest, rest)

    def after(self, func: Callable, args: tuple, kwargs: dict, values: Many) -> list["Gate"]:
        """What an affine function, whose results are ``values``, makes of it."""
        moved, rest = (
            several(func(*(new if a is self.value else a for a in args), **kwargs))
            for new in (self.moved, self.rest)
        )
        return [Gate(*parts) for parts in zip(values, moved, rest, strict=True)]

    def times(self, signal: Tensor, how: str) -> Tensor | None:
        """The product with a signal, shared as ``Rule.gate`` says; None: like any other."""
        if how == "half":
            return None
        if how == "signal":
            return signal * self.value.detach()
        at_rest = signal * (self.value.detach() + self.rest) / 2
        return at_rest + signal.detach() / 2 * (self.moved - self.rest)


@dataclass(frozen=True)
class Normaliser:
    """The reciprocal of an activation: a constant to relevance (Ali et al. 2022, ICML)."""

    value: Tensor

    def after(self, func: Callable, args: tuple, kwargs: dict, values: Many) -> list["Normaliser"]:
        """See ``Gate.after``."""
        return [Normaliser(value) for value in values]

    def times(self, signal: Tensor, how: str) -> Tensor:
        """All relevance goes to the signal."""
        return signal * self.value.detach()


def several(result: Tensor | Many) -> Many:
    """The results of a function that gives one tensor, or several."""
    return [result] if isinstance(result, Tensor) else result


Factor = Gate | Normaliser
"""One of two activations that are multiplied."""


class Held(torch.autograd.Function):
    """A value that passes no relevance on, and must get none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, error: UnsupportedLayerError) -> Tensor:
        """The value computed elsewhere; ``error`` is for the case that relevance arrives."""
        ctx.error = error
        return out.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        """Refuse by name: silence would take the relevance of all that led here."""
        raise ctx.error


def factor_of(value: Any, kind: type[Factor]) -> Factor | None:
    """The factor of this kind that a value is, if it is one."""
    factor = getattr(value, "factor", None)
    at_rest = isinstance(factor, Gate) and not factor.rest.any()
    return factor if isinstance(factor, kind) and not at_rest else None
