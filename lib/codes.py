"""What every quantizer returns, and the checks that they share."""

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("uniform", "channel", "tier", "codebook")


@dataclass(frozen=True, eq=False)
class Codes:
    """Integers and the grid that turns them back into weights.

    Parameters
    ----------
    symbols : Tensor
        int32, shaped like the weight; 0 stands for a weight of exactly zero.
    grid : Tensor
        float32 [k], each value finite and representable in float16. Positive steps, except for a
        codebook: its values, of which the first is zero.
    kind : {"uniform", "channel", "tier", "codebook"}
        How symbols and grid combine, see Notes.
    tiers : Tensor, optional
        uint8, shaped like the weight, values below k; with kind "tier" only.

    Raises
    ------
    ValueError
        For a shape, dtype or value that breaks one of these conditions.

    Notes
    -----
    With s the symbols and g the grid, the decoded weight is
    ``s · g[0]`` (uniform, k = 1), ``s · g[i]`` for output channel i = first index (channel,
    k = number of output channels), ``s · g[tiers]`` (tier), ``g[s]`` (codebook).
    """

    symbols: Tensor
    grid: Tensor
    kind: str
    tiers: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("symbols", "grid", "tiers"):
            if (tensor := getattr(self, name)) is not None:
                object.__setattr__(self, name, tensor.detach().cpu().contiguous())
        symbols, grid, tiers = self.symbols, self.grid, self.tiers
        check(self.kind in KINDS, f"kind {self.kind!r} is none of {', '.join(KINDS)}")
        check(symbols.dtype == torch.int32, f"symbols must be int32, not {symbols.dtype}")
        check(grid.dtype == torch.float32, f"grid must be float32, not {grid.dtype}")
        check(grid.ndim == 1 and len(grid) > 0, f"grid must be [k], not {list(grid.shape)}")
        check(grid.isfinite().all(), "grid holds values that are not finite")
        check(torch.equal(grid, grid.half().float()), "grid is not representable in float16")
        check((tiers is None) == (self.kind != "tier"), "tiers go with kind 'tier', only there")
        if self.kind == "codebook":
            check(grid[0] == 0, "the first value of a codebook must be zero")
            check((grid[1:] != 0).all(), "a codebook holds zero once")
            inside = (symbols >= 0) & (symbols < len(grid))
            check(inside.all(), f"codebook symbols must lie in [0, {len(grid)})")
            return
        check((grid > 0).all(), "steps must be positive")
        if self.kind == "uniform":
            check(len(grid) == 1, f"kind 'uniform' takes one step, not {len(grid)}")
        elif self.kind == "channel":
            channels = symbols.shape[0] if symbols.ndim else 0
            check(len(grid) == channels, f"{len(grid)} steps for {channels} output channels")
        elif tiers is not None:
            check(tiers.dtype == torch.uint8, f"tiers must be uint8, not {tiers.dtype}")
            check(tiers.shape == symbols.shape, "tiers must be shaped like the symbols")
            check(not len(tiers) or int(tiers.max()) < len(grid), "a tier has no step in the grid")

    def decode(self) -> Tensor:
        """Weights, float32, shaped like the symbols; the same bits on every machine."""
        if self.kind == "codebook":
            return self.grid[self.symbols.long()]
        if self.tiers is not None:
            return self.symbols * self.grid[self.tiers.long()]
        return self.symbols * self.grid.reshape(-1, *[1] * (self.symbols.ndim - 1))


def storable(step: Tensor) -> Tensor:
    """Round positive steps to float16, away from its zero and infinity."""
    return step.clamp(2.0**-24, 65504.0).half().float()


def halved(values: Tensor) -> Tensor:
    """Values in float16, or as they are where that cannot hold the largest of them."""
    halves = values.half()
    largest = float(values.abs().max()) if values.numel() else 0.0
    held = largest == 0 or torch.finfo(torch.float16).smallest_normal <= largest
    return halves if held and bool(halves.isfinite().all()) else values


def mask_like(weight: Tensor, mask: Tensor | None) -> Tensor:
    """The mask, checked, on the CPU; all True where there is none."""
    if mask is None:
        return torch.ones(weight.shape, dtype=torch.bool)
    check(mask.dtype == torch.bool, f"the mask must be bool, not {mask.dtype}")
    shapes = f"{list(mask.shape)}, its weight {list(weight.shape)}"
    check(mask.shape == weight.shape, f"the mask is {shapes}")
    return mask.cpu()


def kept_weight(weight: Tensor, mask: Tensor | None) -> Tensor:
    """The weight as float32 on the CPU, masked weights zero."""
    weight = weight.detach().float().cpu()
    check(weight.isfinite().all(), "the weight holds values that are not finite")
    return weight * mask_like(weight, mask)


def check(condition: bool | Tensor, message: str) -> None:
    """Raise ValueError with a message unless the condition holds."""
    if not condition:
        raise ValueError(message)
