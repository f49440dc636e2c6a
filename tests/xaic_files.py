"""Codes, a compressed model, and equality bit by bit, for several test modules."""

import torch
from torch import nn

from lib.codec import Compressed, Constant, container
from lib.quantize import Codes


def codes(shape, kind="uniform", seed=0, levels=3):
    """Random codes of the given kind."""
    draw = torch.Generator().manual_seed(seed)
    k = {"uniform": 1, "channel": shape[0] if shape else 1}.get(kind, levels)
    grid = (torch.rand(k, generator=draw) + 0.01).half().float()
    symbols = torch.randn(shape, generator=draw).mul(3).round().int()
    tiers = torch.randint(k, shape, generator=draw).to(torch.uint8) if kind == "tier" else None
    if kind == "codebook":
        grid[0], symbols = 0.0, symbols.abs().clamp(max=k - 1)
    return Codes(symbols, grid, kind, tiers)


def network():
    """The architecture of :func:`example`."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)
    )


def example():
    """Codes of two kinds, a constant, float16, and tensors as they are."""
    entries = dict(network().state_dict())
    entries["0.weight"] = codes((16, 3, 3, 3), "channel")
    entries["4.weight"] = codes((10, 64), "tier")
    entries["4.bias"] = entries["4.bias"].half()
    entries["1.running_mean"] = Constant(torch.tensor(0.0), (16,))
    return Compressed(entries, {"recipe": "lrp-paper"})


def same(first, second):
    """Whether two state_dicts agree in names, their order, dtypes and every bit."""
    return list(first) == list(second) and all(
        a.dtype == b.dtype and a.shape == b.shape and container._raw(a) == container._raw(b)
        for a, b in zip(first.values(), second.values(), strict=True)
    )
