"""Scored weights that a forward pass uses outside of their layers: followed, or refused by name."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..inputs import UnsupportedLayerError, tensors
from .functions import Forward, look_up, stored
from .kinds import ELEMENTWISE, GRADIENT, LIKE
from .layers import Key
from .operations import Operation

# What leaves the weight as it is, whatever its gradient: relevance does not ask for it.
SAME = {
    "contiguous", "to", "float", "double", "type", "type_as", "clone", "detach", "data", "view_as",
}  # fmt: skip
TURNED = {"t", "T", "mT", "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis"}
LOOKUPS = {"getitem", "select", "index_select", "narrow"}
PRODUCTS = {"matmul", "mm", "addmm"}
MIXED = PRODUCTS | {"rmatmul", "bmm", "baddbmm", "einsum"}  # with images, which need no gradient


class Following(Forward, Protocol):
    """What is asked of the forward pass besides."""

    names: dict[int, str]
    aliases: dict[int, tuple[Tensor, Key, bool]]

    def vouch(self, result: Any) -> Any: ...
    def applied(self, func: Callable, name: str, args: Any, kwargs: dict) -> Any: ...


def place(mode: Following, value: Any) -> tuple[Key, bool] | None:
    """Which rows of which scored weight a value is, and whether transposed; None for others."""
    if id(value) in mode.names:
        return (mode.names[id(value)], None, None), False
    return mode.aliases[id(value)][1:] if id(value) in mode.aliases else None


def used(mode: Following, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    """The result of a function, not a layer's, of which an argument is a scored weight.

    Views of it are remembered, for the layer that reads them. ``x @ w.T`` is a linear layer. Rows
    that are added to activations, joined with them or rearranged are looked up, as an embedding
    does. What is computed from weights alone (normalised, standardised) may be the weight of a
    layer: relevance is carried on to those. All else has no rule.

    Raises
    ------
    UnsupportedLayerError
        Names the weight, the function and the module.
    """
    if name in PRODUCTS and (result := _product(mode, name, args, kwargs)) is not None:
        return result
    subject = place(mode, args[0]) if args else None
    if subject is not None:
        weight, (key, turned) = args[0], subject
        with torch.no_grad():
            value = func(*args, **kwargs)
        if not any(t.is_floating_point() for t in tensors(value)):
            return value  # a shape, a device
        if isinstance(value, Tensor):
            if value is weight:
                return value
            if name in SAME and value.shape == weight.shape and value.dtype == weight.dtype:
                return _remember(mode, value, key, turned)
            if name in TURNED and weight.dim() == 2 and value.stride() == weight.stride()[::-1]:
                return _remember(mode, value, key, not turned)
            if rows := _rows(weight, value, key, turned):
                return _remember(mode, value, rows, turned)
        if name in LOOKUPS and weight.dim() == 2 and not turned:
            every = torch.arange(len(weight), device=weight.device)
            index = _index(func, every, args[1:], kwargs)
            if index is not None:
                found = look_up(mode, index, weight, key)
                # The same rows for all images are a weight, not an activation.
                chosen = any(True for _ in tensors((args[1:], kwargs)))
                return found if chosen else computed(found)
    if name in LIKE and subject is None:
        return mode.applied(func, name, args, kwargs)
    weights = [t for t in tensors((args, kwargs)) if place(mode, t)]
    if all(t.dim() == 2 for t in weights) and (name in GRADIENT or name in ELEMENTWISE):
        args, kwargs = _replaced(mode, (args, kwargs), name, _rows_of)
        return computed(mode.applied(func, name, args, kwargs), (args, kwargs))
    active = [t for t in tensors((args, kwargs)) if t.requires_grad and not hasattr(t, "computed")]
    args, kwargs = _replaced(
        mode, (args, kwargs), name, None if active or name in MIXED else stored
    )
    return mode.__torch_function__(func, (), args, kwargs)


def computed(result: Any, of: Any = ()) -> Any:
    """The same, marked as computed from weights if all that it was made of is.

    The mark holds the look-ups that have a part in it.
    """
    parts: list[Any] = [t for t in tensors(of) if t.requires_grad]
    if all(hasattr(t, "computed") for t in parts):
        for tensor in tensors(result):
            own = getattr(tensor, "looked", ())
            tensor.computed = {  # type: ignore[attr-defined]
                *own,
                *(layer for t in parts for layer in t.computed),
            }
    return result


def multiplies(weight: Any) -> None:
    """A computed weight multiplies activations: what was looked up for it is no row of them."""
    for layer in weight.computed:
        layer.stored = True


def straightened(mode: Following, weight: Tensor) -> Tensor:
    """A scored weight that a layer reads transposed: one that is computed from it."""
    at = place(mode, weight)
    if at is None or not at[1]:
        return weight
    value = stored(mode, weight.mT, at[0])
    return mode.vouch(computed(value.mT, value))


def _product(mode: Following, name: str, args: tuple, kwargs: dict) -> Tensor | None:
    """``x @ w.T`` and ``b + x @ w.T``, as a layer."""
    *rest, x, w = args if len(args) > 1 else (None, None)
    at = place(mode, w)
    plain = not kwargs and len(rest) == (name == "addmm")
    if at is None or not at[1] or not plain or place(mode, x) or x.dim() < 2:
        return None
    bias = rest[0] if rest else None
    if bias is not None and (bias.dim() != 1 or bias.requires_grad or place(mode, bias)):
        return None
    return mode.layer(x, w.mT, bias, Operation(), at[0])


def _remember(mode: Following, value: Tensor, key: Key, turned: bool) -> Tensor:
    mode.aliases[id(value)] = (value, key, turned)
    return value


def _rows(weight: Tensor, value: Tensor, key: Key, turned: bool) -> Key | None:
    """The key of consecutive rows of a weight, where a view consists of these."""
    if turned or value.shape[1:] != weight.shape[1:] or value.stride() != weight.stride():
        return None
    if value.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
        return None
    first = int((value.storage_offset() - weight.storage_offset()) // weight.stride(0))
    first += key[1] or 0
    return key[0], first, first + len(value)


def _index(func: Callable, every: Tensor, rest: tuple, kwargs: dict) -> Tensor | None:
    """Numbers of the rows that a look-up takes; None where it looks for more than rows."""
    first = rest[0] if rest else None
    if func is Tensor.__getitem__ and isinstance(first, tuple):
        return None
    if func is not Tensor.__getitem__ and kwargs.get("dim", first) not in (0, -2):
        return None
    if func is not Tensor.__getitem__:  # of a matrix's axes, rows are the last but one
        rest = (0, *rest[1:]) if rest else rest
        kwargs = kwargs | {"dim": 0} if "dim" in kwargs else kwargs
    return func(every, *rest, **kwargs)


def _rows_of(mode: Forward, weight: Tensor, key: Key) -> Tensor:
    return computed(look_up(mode, torch.arange(len(weight), device=weight.device), weight, key))


def _replaced(
    mode: Following, tree: Any, name: str, new: Callable[[Forward, Tensor, Key], Tensor] | None
) -> Any:
    """The same arguments, with values that relevance returns from in place of scored weights."""
    if isinstance(tree, (tuple, list)):
        return type(tree)(_replaced(mode, branch, name, new) for branch in tree)
    if isinstance(tree, dict):
        return {key: _replaced(mode, branch, name, new) for key, branch in tree.items()}
    if not isinstance(tree, Tensor) or (at := place(mode, tree)) is None:
        return tree
    if at[1] or new is None:
        raise refusal(mode, at[0], name)
    return mode.vouch(new(mode, tree, at[0]))


def refusal(mode: Forward, key: Key, name: str) -> UnsupportedLayerError:
    """The error for a scored weight in a function that has no rule for it."""
    advice = "call the layer, or torch.nn.functional.linear with the weight itself"
    path, computed, rest = key[0].partition(".parametrizations.")
    if computed:
        weight = rest.partition(".")[0]
        advice = (
            "apply torch.nn.utils.parametrize.remove_parametrizations("
            f"model.{path}, {weight!r}) first"
        )
    return mode.refuse(f"the weight {key[0]!r} in {name!r}, outside of its layer", advice)
