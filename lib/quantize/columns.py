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
    bits: Tensor, block: int = 128,
) -> Tensor:  # fmt: skip
    """Code columns [groups, d, units] in turn, errors fed forward by a quadratic form.

    ``quadratic`` is M, for errors of earlier columns, or H, for errors of all others. Feedback is
    gathered by matrix products for a block of columns, and column by column within; there numpy,
    on the same memory, since calls of torch cost more than a column.

    References
    ----------
    Frantar et al.: GPTQ, ICLR 2023, section 3.3, step 2 (lazy batch updates).
    """
    symbols, diagonal = symbols.clone(), quadratic.diagonal(dim1=1, dim2=2)
    triangular = not quadratic[:, 1:, 0].any() and not quadratic.tril(-1).any()
    energy = ((diagonal.square() if triangular else diagonal)[:, :, None] * damage[:, :1]).numpy()
    errors = scaled - symbols
    chosen, error, weights, keep = (t.numpy() for t in (symbols, errors, scaled, kept))
    for start in range(0, scaled.shape[1], block):
        stop = min(start + block, scaled.shape[1])
        past = slice(0, stop) if triangular else slice(None)
        coupling = quadratic[:, past, start:stop] / diagonal[:, None, start:stop]
        within = coupling[:, start:stop]
        within.diagonal(dim1=1, dim2=2).zero_()
        targets = (scaled[:, start:stop] + coupling.mT @ errors[:, past]).numpy()
        forward = within.numpy()
        for j in range(stop - start):
            column = start + j
            symbol = _cheapest(targets[:, j], energy[:, column], bits.numpy()) * keep[:, column]
            now = weights[:, column] - symbol
            change = now - error[:, column]
            targets[:, j + 1 :] += forward[:, j, j + 1 :, None] * change[:, None]
            chosen[:, column], error[:, column] = symbol, now
    return symbols


Array = NDArray[np.float32]


def _cheapest(target: Array, damage: Array, bits: Array) -> Array:
    """See ``cheapest``."""
    top = len(bits) // 2
    nearest = np.rint(target)
    np.clip(nearest, -top, top, out=nearest)
    next_ = nearest - np.sign(nearest)
    first, second, zero = target - nearest, target - next_, target * target
    for cost, trial in ((first, nearest), (second, next_)):
        cost *= cost
        cost *= damage
        cost += bits.take((trial + top).astype(np.intp))
    zero *= damage
    zero += bits[top]
    symbols = np.where(second < first, next_, nearest)
    symbols[zero < np.minimum(first, second)] = 0
    return symbols
