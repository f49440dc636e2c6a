"""Where adaptive counting starts from: Student t distributions over a tensor's symbols."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UNIT = 1 << 16
"""Pseudo-counts that make one count."""

_SCALES, _POWERS, _STRENGTHS = 16, 3, (1, 4, 16, 64, 256)

PRIORS = _SCALES * _POWERS * len(_STRENGTHS)
"""Number of priors; a prior's code is below it."""

Known = tuple[NDArray[np.intp], Tensor, Tensor, Tensor]
"""Indices of the values in use [u]; of each prior the pseudo-counts [PRIORS, u], their log-gammas
and their sum [PRIORS]."""


def prior(values: NDArray[np.int64], code: int) -> NDArray[np.int64]:
    """Pseudo-counts with which the counting of a block's symbols starts.

    int64 [k], all positive, in units of 1 / :data:`UNIT` counts, for the `values`, int64 [k], that
    can be coded; `code` is scale, tails and weight in one number below :data:`PRIORS`.
    """
    code, strength = divmod(code, len(_STRENGTHS))
    shape = _student(values, *divmod(code, _POWERS))
    return 1 + shape * (_STRENGTHS[strength] * UNIT) // int(shape.sum())


def candidates(values: NDArray[np.int64], counts: NDArray[np.int64]) -> Known:
    """All priors of a tensor, prepared for :func:`best_prior`.

    `counts` says how often the tensor holds each of `values`, both int64 [k].
    """
    used = np.flatnonzero(counts)
    shapes = [_student(values, *divmod(code, _POWERS)) for code in range(_SCALES * _POWERS)]
    shares = np.stack([shape[used] / shape.sum() for shape in shapes])
    alphas = np.outer(shares, _STRENGTHS).reshape(len(shapes), len(used), -1).swapaxes(1, 2)
    alpha = torch.from_numpy(alphas.reshape(PRIORS, len(used)))
    whole = torch.tensor(_STRENGTHS, dtype=torch.float64).repeat(len(shapes))
    return used, alpha, torch.lgamma(alpha), whole


def best_prior(known: Known, counts: NDArray[np.int64]) -> int:
    """Code of the prior under which symbols with these counts, int64 [k], take the fewest bits.

    The length is the Dirichlet-multinomial one,
    ``ln Γ(A + n) - ln Γ(A) - Σ_s [ln Γ(α_s + n_s) - ln Γ(α_s)]``. The scale is searched first, the
    rest next to it.
    """
    used, *priors = known
    held = torch.from_numpy(counts[used].astype(np.float64))  # [u]

    def best(codes: slice) -> int:
        alpha, log_gamma, whole = (prior[codes] for prior in priors)
        gain = (torch.lgamma(alpha + held) - log_gamma).sum(1)
        bits = torch.lgamma(whole + held.sum()) - torch.lgamma(whole) - gain
        return codes.start + int(bits.argmin()) * (codes.step or 1)

    variants = _POWERS * len(_STRENGTHS)
    start = best(slice(variants // 2, None, variants)) // variants * variants
    return best(slice(max(start - variants, 0), start + 2 * variants))


def _student(values: NDArray[np.int64], scale: int, power: int) -> NDArray[np.int64]:
    """Integers in proportion to ``(1 + values²/s²)^-q``, s² = 4^(scale - 4), q = 2^power."""
    tails = 1 + values.astype(np.float64) ** 2 / 4.0 ** (scale - 4)
    for _ in range(power):
        tails = tails * tails
    return np.floor(2.0**24 / tails).astype(np.int64) + 1
