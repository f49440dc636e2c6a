"""Factors: activations that share the relevance of a product by a rule of their own."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.functional import jvp

from ..inputs import UnsupportedLayerError, tensors
from . import kinds
from .layers import Activate

Many = Sequence[Tensor]
Multiply = Callable[[Tensor, Tensor], Tensor]  # two factors -> their product


def _softplus(x: Tensor) -> Tensor:
    """``softplus(x) - log 2``."""
    small = torch.log1p(torch.expm1(x.clamp(max=20)) / 2)
    return torch.where(x > 20, x - math.log(2), small)


# What a gate is for an input of zero, and what moves it from there, without the rounding of a
# difference. What rests at zero (tanh) is a signal until a shift is added to it.
RESTING: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "sigmoid": (0.5, lambda x: (x / 2).tanh() / 2),
    "hardsigmoid": (0.5, lambda x: F.hardtanh(x / 6, -0.5, 0.5)),
    "special_expit": (0.5, lambda x: (x / 2).tanh() / 2),
    "tanh": (0.0, torch.tanh),
    "softsign": (0.0, F.softsign),
    "atan": (0.0, torch.atan),
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

    @classmethod
    def seen(cls, activation: Tensor) -> "Gate":
        """The gate that an activation is; others have nothing at rest and move by themselves."""
        factor = getattr(activation, "factor", None)
        if isinstance(factor, Gate):
            return factor
        return cls(activation, activation, torch.zeros_like(activation))


def shifted(total: Tensor, summands: Sequence[Any], kwargs: dict) -> Tensor:
    """A sum; where it is that of an activation and a number, it remembers both."""
    numbers = [t for t in summands if isinstance(t, (int, float))]
    if len(numbers) == 1 and len(summands) == 2 and not kwargs:
        (activation,) = tensors(summands)
        total.shift = (activation, numbers[0])  # type: ignore[attr-defined]
    return total


def activated(out: Tensor, name: str, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """The output of an elementwise function, as propagated; marked where it is a gate.

    A number added and cut off on both sides, ``relu6(x + 3)``, is a hard sigmoid.
    """
    x = args[0] if args else kwargs["input"]
    if x.is_complex() and not out.is_complex():
        return func(*args, **kwargs)  # of degree one, so that its gradient conserves relevance
    result = Activate.apply(x, out)
    bounds = [t for t in (*args[1:], *kwargs.values()) if t is not None and t is not x]
    cut = name in kinds.CUT or (name in kinds.BOUNDS and len(bounds) == 2)
    if name in RESTING:
        result.factor = Gate.of(x, result, name)
    elif cut and hasattr(x, "shift"):
        activation, number = x.shift
        with torch.no_grad():
            still = func(torch.full_like(x, number), *args[1:], **kwargs)
        moved = Activate.apply(activation, out - still) + still
        result.factor = Gate(result, moved, still)
    return result


class Normaliser:
    """The reciprocal of an activation: a constant to relevance (Ali et al. 2022, ICML)."""


def several(result: Tensor | Many) -> Many:
    """The results of a function that gives one tensor, or several."""
    return [result] if isinstance(result, Tensor) else result


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


def shared(one: Tensor, other: Tensor, how: str, multiply: Multiply) -> Tensor | None:
    """The product of two activations, shared as ``Rule.gate`` says; None: by equal halves.

    Of two gates the product is one itself; see ``hand_on``.
    """
    first, second = Gate.seen(one), Gate.seen(other)
    shifted = [bool(gate.rest.any()) for gate in (first, second)]
    if how == "half" or (first.value is first.moved and second.value is second.moved):
        return None
    if how == "signal":
        if shifted == [False, True]:
            return multiply(one, other.detach())
        return multiply(one.detach(), other) if shifted == [True, False] else None
    return None if all(shifted) else _both_moved(first, second, multiply)


def _both_moved(first: Gate, second: Gate, multiply: Multiply) -> Tensor:
    """What a product is at rest, and both Shapley values of what moves it from there."""
    one, other = ((gate.value.detach() + gate.rest) / 2 for gate in (first, second))
    by_first = multiply(first.moved - first.rest, other)
    by_second = multiply(one, second.moved - second.rest)
    return by_first + by_second + multiply(first.rest, second.rest)


def hand_on(func: Callable, name: str, args: tuple, kwargs: dict, result: Any) -> None:
    """Mark the ``result`` of a function as a factor, where it makes one of those that it reads.

    A function that is linear in all activations takes a gate as it is and at rest alike; where
    others are joined with gates, these count whole, as signals with nothing at rest. So does a
    selection, of the places where its values came from. What moves an elementwise function of a
    gate is what moves the gate, times the slope between both ends. The product of two gates moves
    by both Shapley values.
    """
    tracked = {id(t): t for t in tensors((args, kwargs)) if t.requires_grad}
    factors = {i: getattr(t, "factor", None) for i, t in tracked.items()}
    gates = {i: factor for i, factor in factors.items() if isinstance(factor, Gate)}
    if name in kinds.KEPT and all(isinstance(f, Normaliser) for f in factors.values()):
        for value in several(result):
            value.factor = Normaliser()  # type: ignore[attr-defined]
    if not gates:
        return

    def at(new: dict[int, Tensor]) -> Many:
        return several(func(*_swapped(args, new), **_swapped(kwargs, new)))

    def selected(new: dict[int, Tensor]) -> Many:
        # the derivative of a selection takes from any tensor what it takes from its argument
        def selection(*args: Tensor) -> tuple[Tensor, ...]:
            out = at(dict(zip(new, args, strict=True)))
            return tuple(t for t in out if t.is_floating_point())

        found = tuple(t.detach() for t in tracked.values())
        return jvp(selection, found, tuple(new.values()), create_graph=True)[1]

    seen = {i: Gate.seen(t) for i, t in tracked.items()}
    moved = {i: gate.moved for i, gate in seen.items()}
    rest = {i: gate.rest for i, gate in seen.items()}
    alone, whole = len(tracked) == 1, sum(t.requires_grad for t in tensors((args, kwargs)))
    selects = name in kinds.SELECTING and whole == sum(1 for _ in tensors((args, kwargs)))
    if (
        selects or name in kinds.JOINS
        or (alone and whole == 1 and name in kinds.KEPT | kinds.PRODUCTS)
    ):  # fmt: skip
        values = [t for t in several(result) if t.is_floating_point()]  # beside them, indices
        take = selected if selects else at
        for value, move, still in zip(values, take(moved), take(rest), strict=True):
            value.factor = Gate(value, move, still)  # type: ignore[attr-defined]
    elif alone and name in kinds.BENT:
        (gate,), (place,) = gates.values(), gates
        result.factor = _bent(lambda x: at({place: x})[0], gate, result)
    elif len(gates) == 2 == len(tracked) and name in kinds.PRODUCTS:
        (still,) = at(rest)
        if still.any():
            first, second = gates.values()
            both = _both_moved(first, second, swap(func, args, kwargs, *tracked.values()))
            result.factor = Gate(result, both, still)


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


def swap(func: Callable, args: tuple, kwargs: dict, one: Tensor, other: Tensor) -> Multiply:
    """The product that a function gives for other values of two of its arguments."""
    return lambda first, second: func(
        *_swapped(args, new := {id(one): first, id(other): second}), **_swapped(kwargs, new)
    )
