"""Symbols of all units of a layer at once, column after column, errors made up for."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def code_lengths(symbols: Tensor, top: int) -> Tensor:
    """Bits [2·top + 1] of the symbols −top … top by their present distribution, smoothed."""
    counts = torch.bincount((symbols + top).long().flatten(), minlength=2 * top + 1) + 0.1
    return -(counts / counts.sum()).log2().float()


def cheapest(target: Tensor, damage: Tensor, bits: Tensor, zero: Tensor | None = None) -> Tensor:
    """Symbols of least damage · (target − s)² + bits, among the nearest, the next and zero.

    Where ``zero`` is given, it is a factor of what symbol zero costs.
    """
    top = len(bits) // 2
    nearest = target.round().clamp_(-top, top)
    trials = torch.stack([nearest, nearest - nearest.sign(), torch.zeros_like(nearest)])
    cost = damage * (target - trials).square_() + bits[(trials + top).long()]
    cost = cost if zero is None else torch.where(trials == 0, zero * cost, cost)
    return trials.gather(0, cost.argmin(0, keepdim=True)).squeeze(0)


def code_columns(
    scaled: Tensor, symbols: Tensor, kept: Tensor, quadratic: Tensor, damage: Tensor,
    bits: Tensor, triangular: bool, block: int = 128, few: int = 16,
) -> Tensor:  # fmt: skip
    """Code columns [groups, d, units] in turn, errors fed forward by a quadratic form.

    ``quadratic`` is M, ``triangular``, for errors of earlier columns, or H, for errors of all
    others. Feedback is gathered by matrix products for a block of columns and for a few within,
    and column by column among these; there numpy, on the same memory, since calls of torch cost
    more than a column.

    References
    ----------
    Frantar et al.: GPTQ, ICLR 2023, section 3.3, step 2 (lazy batch updates).
    """
    symbols, diagonal = symbols.clone(), quadratic.diagonal(dim1=1, dim2=2)
    energy = ((diagonal.square() if triangular else diagonal)[:, :, None] * damage[:, :1]).numpy()
    errors, changes = scaled - symbols, torch.zeros_like(scaled[:, :block])
    lengths, top = bits.numpy(), len(bits) // 2
    chosen, error, changed, weights, keep = (
        t.numpy() for t in (symbols, errors, changes, scaled, kept)
    )
    for start in range(0, scaled.shape[1], block):
        stop = min(start + block, scaled.shape[1])
        past = slice(0, stop) if triangular else slice(None)
        coupling = quadratic[:, past, start:stop] / diagonal[:, None, start:stop]
        within = coupling[:, start:stop]
        within.diagonal(dim1=1, dim2=2).zero_()
        wanted = scaled[:, start:stop] + coupling.mT @ errors[:, past]
        forward, targets = within.numpy(), wanted.numpy()
        for first in range(0, stop - start, few):
            last = min(first + few, stop - start)
            for j in range(first, last):
                column = start + j
                symbol = _cheapest(targets[:, j], energy[:, column], lengths, top)
                symbol *= keep[:, column]
                now = weights[:, column] - symbol
                np.subtract(now, error[:, column], out=changed[:, j])
                targets[:, j + 1 : last] += forward[:, j, j + 1 : last, None] * changed[:, None, j]
                chosen[:, column], error[:, column] = symbol, now
            ahead = within[:, first:last, last:].mT
            wanted[:, last:].baddbmm_(ahead, changes[:, first:last])
    return symbols


Array = NDArray[np.float32]


def _cheapest(target: Array, damage: Array, bits: Array, top: int) -> Array:
    """See ``cheapest``."""
    trials = np.empty((2, *target.shape), np.float32)
    nearest, next_ = trials
    np.rint(target, out=nearest)
    np.minimum(np.maximum(nearest, -top, out=nearest), top, out=nearest)
    np.subtract(nearest, np.sign(nearest), out=next_)
    cost = target - trials
    cost *= cost
    cost *= damage
    cost += bits.take((trials + top).astype(np.intp))
    zero = target * target
    zero *= damage
    zero += bits[top]
    symbols = np.where(cost[1] < cost[0], next_, nearest)
    symbols *= zero >= cost.min(0)
    return symbols
