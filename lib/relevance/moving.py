"""Which scored weights move the outputs, by ordinary gradients: to compare with what was seen."""

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..inputs import FullPrecision, own, tensors


def steps_of(outputs: Iterable[Tensor]) -> set[Any]:
    """All steps of the graph by which gradients come back from outputs."""
    ahead, found = [t.grad_fn for t in outputs], set()
    while ahead:
        step = ahead.pop()
        if step is not None and step not in found:
            found.add(step)
            ahead += [before for before, _ in step.next_functions]
    return found


def moving_of(network: nn.Module, scored: Mapping[str, Tensor], images: Tensor) -> set[str]:
    """Names of the scored weights on which the outputs depend, to ordinary gradients.

    None where there are no such gradients; what the forward pass cannot do is told elsewhere.
    """
    names = {id(weight): name for name, weight in scored.items()}
    found: set[str] = set()
    every = list(network.parameters())
    wanted = [p.requires_grad for p in every]
    try:
        for p in every:  # a model may keep what it makes of others, which must not bring gradients
            p.requires_grad_(id(p) in names)
        images = own(images, network)
        if images.is_floating_point():  # a reentrant checkpoint asks for it
            images = 1 * images.requires_grad_(True)
        with FullPrecision():
            outputs = [t for t in tensors(network(images)) if t.requires_grad]
        leaves = {id(getattr(step, "variable", None)) for step in steps_of(outputs)}
        found = {name for place, name in names.items() if place in leaves}
        reduce(torch.add, [t.sum() for t in outputs]).backward()
        found |= {n for n, w in scored.items() if w.grad is not None and bool(w.grad.any())}
    except Exception:
        return found
    finally:
        for p, before in zip(every, wanted, strict=True):
            p.grad = None
            p.requires_grad_(before)
    return found
