"""Symbols of all units of a layer at once, column after column, errors made up for."""

import torch
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
    gathered by matrix products for a block of columns, and column by column within.
    """
    symbols, diagonal = symbols.clone(), quadratic.diagonal(dim1=1, dim2=2)
    coupling = quadratic / diagonal[:, None] - torch.eye(len(diagonal[0])).to(quadratic)
    triangular = not quadratic.tril(-1).any()
    energy = diagonal.square() if triangular else diagonal
    errors = scaled - symbols
    for start in range(0, scaled.shape[1], block):
        stop = min(start + block, scaled.shape[1])
        past = slice(0, stop) if triangular else slice(None)
        targets = scaled[:, start:stop] + coupling[:, past, start:stop].mT @ errors[:, past]
        for j in range(start, stop):
            symbol = cheapest(targets[:, j - start], energy[:, j, None] * damage[:, 0], bits)
            symbols[:, j] = symbol * kept[:, j]
            error = scaled[:, j] - symbols[:, j]
            targets[:, j - start + 1 :].baddbmm_(
                coupling[:, j, j + 1 : stop, None], (error - errors[:, j])[:, None]
            )
            errors[:, j] = error
    return symbols
