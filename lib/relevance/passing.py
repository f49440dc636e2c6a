"""Torch functions that are no layers: how relevance passes each."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..inputs import tensors
from . import kinds
from .factors import Held, Multiply, Normaliser, activated, shifted, swap
from .functions import looked_up_per_sample
from .origins import Origins
from .weights import Following, multiplies


class Passing(Following, Protocol):
    """What is asked of the forward pass besides."""

    held: list[Tensor]
    origins: Origins
    shares: bool

    def product(self, one: Tensor, other: Tensor, multiply: Multiply = torch.mul) -> Tensor: ...


def passed(mode: Passing, func: Callable, name: str, tracked: int, args: Any, kwargs: dict) -> Any:
    """The result of a function that reads so many activations and is no layer.

    Raises
    ------
    UnsupportedLayerError
        There is no rule for it; names the function and the module.
    """
    if name in kinds.FUSED:
        product, scale = kinds.FUSED[name]
        count = _tracked(args[1:])
        term = (
            passed(mode, product, product.__name__, count, args[1:], {})
            if count else product(*args[1:])
        )  # fmt: skip
        return args[0] * kwargs.get("beta", 1) + term * kwargs.get(scale, 1)
    constant = name in kinds.QUOTIENTS and not _tracked(args[:1])
    power = name == "pow" and not _tracked(args[1:])  # of an activation to a constant
    constant |= power and not bool((torch.as_tensor(args[1]) > 0).all())
    if constant or name in kinds.RECIPROCALS:
        return _reciprocal(mode, func, name, args, kwargs)
    if name in kinds.FIRST and _tracked((args[1:], kwargs)):
        raise mode.refuse(f"{name!r} of more than one activation", kinds.ADVICE[name])
    bound = name in kinds.BOUNDS and tracked > 1  # an activation itself: as in minimum
    if power or (name in kinds.ELEMENTWISE and not bound):
        with torch.no_grad():
            out = func(*args, **kwargs)
        return activated(out, name, func, args, kwargs)
    if name in ("add", "radd"):
        args = looked_up_per_sample(mode, args)
        return shifted(func(*args, **kwargs), args, kwargs)
    if name == "scatter" and kwargs.get("reduce"):
        raise mode.refuse("'scatter' that reduces", "use scatter_add")
    if name in kinds.GRADIENT or bound:
        return func(*args, **kwargs)
    if name == "var":  # of degree two: its gradient would bring twice its relevance
        return mode.half(func(*args, **kwargs))
    if name in kinds.QUOTIENTS and kwargs.get("rounding_mode") is None:
        mode.held += [t for t in args[1:2] if isinstance(t, Tensor)]
        divisor = args[1].detach() if isinstance(args[1], Tensor) else args[1]
        return func(args[0], divisor, *args[2:], **kwargs)
    if name in kinds.PRODUCTS:
        return _product(mode, func, name, tracked, args, kwargs)
    result = None if name in ("item", "tolist", "numpy") else func(*args, **kwargs)
    if result is not None and not any(t.is_floating_point() for t in tensors(result)):
        return result
    raise mode.refuse(f"{name!r}", kinds.ADVICE.get(name, ""))


def _product(
    mode: Passing, func: Callable, name: str, tracked: int, args: Any, kwargs: dict
) -> Tensor:
    if tracked > 2:
        raise mode.refuse(f"a product of {tracked} activations")
    weights = [t for t in tensors((args, kwargs)) if hasattr(t, "computed")]
    every = list(tensors((args, kwargs)))
    raw = any(mode.origins.raw(t) and t.is_floating_point() for t in every)
    if raw or tracked > len(weights):
        for weight in weights:
            multiplies(weight)
    if tracked < 2 or len(weights) == 1:  # linear in the activation, as a layer is
        mode.shares |= raw
        return func(*args, **kwargs)
    one, other = (t for t in tensors((args, kwargs)) if t.requires_grad)
    if one is other:
        return mode.half(func(*args, **kwargs))
    return mode.product(one, other, swap(func, args, kwargs, one, other))


def _reciprocal(mode: Passing, func: Callable, name: str, args: Any, kwargs: dict) -> Tensor:
    with torch.no_grad():
        out = func(*args, **kwargs)
    x = next(t for t in tensors((args, kwargs)) if t.requires_grad)
    error = mode.refuse(
        f"the reciprocal of an activation ({name!r}) that is no factor of another one",
        "multiply the activation that it normalises by it, or divide that one",
    )
    result = Held.apply(x, out, error)
    result.factor = Normaliser()
    return result


def _tracked(values: Any) -> int:
    return sum(t.requires_grad for t in tensors(values))
