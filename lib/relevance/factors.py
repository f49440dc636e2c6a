"""Factors: activations that share the relevance of a product by a rule of their own."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import UnsupportedLayerError, tensors
from . import kinds
from .layers import Activate

Many = Sequence[Tensor]
Multiply = Callable[[Tensor, Tensor], Tensor]  # signal and factor -> their product


def _softplus(x: Tensor) -> Tensor:
    """``softplus(x) - log 2``."""
    small = torch.log1p(torch.expm1(x.clamp(max=20)) / 2)
    return torch.where(x > 20, x - math.log(2), small)


# What a gate is for an input of zero, and what moves it from there, without the rounding of a
# difference. One that rests at zero (tanh) is a signal until a shift is added to it.
RESTING: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "sigmoid": (0.5, lambda x: (x / 2).tanh() / 2),
    "hardsigmoid": (0.5, lambda x: F.hardtanh(x / 6, -0.5, 0.5)),
    "tanh": (0.0, torch.tanh),
    "erf": (0.0, torch.erf),
    "softplus": (math.log(2), _softplus),
    "log_sigmoid": (-math.log(2), lambda x: -_softplus(-x)),
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

    def times(self, signal: Tensor, how: str, multiply: Multiply) -> Tensor | None:
        """The product with a signal, shared as ``Rule.gate`` says; None: like any other."""
        if how == "half":
            return None
        if how == "signal":
            return multiply(signal, self.value.detach())
        at_rest = multiply(signal, (self.value.detach() + self.rest) / 2)
        return at_rest + multiply(signal.detach() / 2, self.moved - self.rest)


@dataclass(frozen=True)
class Normaliser:
    """The reciprocal of an activation: a constant to relevance (Ali et al. 2022, ICML)."""

    value: Tensor

    def times(self, signal: Tensor, how: str, multiply: Multiply) -> Tensor:
        """All relevance goes to the signal."""
        return multiply(signal, self.value.detach())


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


def hand_on(func: Callable, name: str, args: tuple, kwargs: dict, result: Any) -> None:
    """Mark the ``result`` of a function as a factor, where it makes one of those that it reads.

    A function that is linear in all activations takes a gate as it is and at rest alike; where
    others are joined with gates, these count whole, as signals with nothing at rest. What moves
    an elementwise function of a gate is what moves the gate, times the slope between both ends.
    The product of two gates has the sum of both Shapley values, as in ``Gate.times``.
    """
    tracked = {id(t): t for t in tensors((args, kwargs)) if t.requires_grad}
    factors = {i: getattr(t, "factor", None) for i, t in tracked.items()}
    gates = {i: factor for i, factor in factors.items() if isinstance(factor, Gate)}
    if name in kinds.KEPT and all(isinstance(f, Normaliser) for f in factors.values()):
        for value in several(result):
            value.factor = Normaliser(value)  # type: ignore[attr-defined]
    # A gate with nothing at rest, among others, is an activation as they are.
    if not gates or (len(gates) < len(tracked) and not any(g.rest.any() for g in gates.values())):
        return

    def at(new: dict[int, Tensor]) -> Many:
        return several(func(*_swapped(args, new), **_swapped(kwargs, new)))

    moved = tracked | {i: gate.moved for i, gate in gates.items()}
    rest = {i: torch.zeros_like(t) for i, t in tracked.items()}
    rest |= {i: gate.rest for i, gate in gates.items()}
    alone, whole = len(tracked) == 1, sum(t.requires_grad for t in tensors((args, kwargs)))
    if name in kinds.JOINS or (alone and whole == 1 and name in kinds.KEPT | kinds.PRODUCTS):
        for value, move, still in zip(several(result), at(moved), at(rest), strict=True):
            value.factor = Gate(value, move, still)  # type: ignore[attr-defined]
    elif alone and name in kinds.BENT:
        (gate,), (place,) = gates.values(), gates
        result.factor = _bent(lambda x: at({place: x})[0], gate, result)
    elif len(gates) == 2 == len(tracked) and name in kinds.PRODUCTS:
        (one, first), (two, second) = gates.items()
        step = at({
            one: first.moved - first.rest, two: (second.value.detach() + second.rest) / 2
        })[0] + at({
            one: (first.value.detach() + first.rest) / 2, two: second.moved - second.rest
        })[0]  # fmt: skip
        still = at(rest)[0]
        result.factor = Gate(result, still + step, still)


def _bent(func: Callable[[Tensor], Tensor], gate: Gate, value: Tensor) -> Gate:
    """The gate that an elementwise function makes of one."""
    with torch.no_grad():
        still = func(gate.rest)
        at_rest, move = (t.expand_as(still) for t in (gate.rest, gate.moved - gate.rest))
        slope = (func(gate.value) - still) / torch.where(move == 0, torch.inf, move)
    middle = (at_rest + move / 2).detach().requires_grad_(True)
    with torch.enable_grad():
        (tangent,) = torch.autograd.grad(func(middle).sum(), middle)
    # Where both ends are close, their difference is but rounding.
    close = move.abs() <= torch.finfo(move.dtype).eps ** 0.5
    slope = torch.where(close, tangent, slope)
    return Gate(value, still + slope * (gate.moved - gate.rest), still)


def _swapped(tree: Any, new: Mapping[int, Tensor]) -> Any:
    """The same arguments, with other tensors in place of some, by their ``id``."""
    if isinstance(tree, (tuple, list)):
        return type(tree)(_swapped(branch, new) for branch in tree)
    if isinstance(tree, dict):
        return {key: _swapped(branch, new) for key, branch in tree.items()}
    return new.get(id(tree), tree)


def swap(func: Callable, args: tuple, kwargs: dict, signal: Tensor, factor: Tensor) -> Multiply:
    """The product that a function gives for other values of signal and factor."""
    return lambda s, f: func(
        *_swapped(args, new := {id(signal): s, id(factor): f}), **_swapped(kwargs, new)
    )
