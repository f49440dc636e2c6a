"""Where adaptive counting starts from: Student t distributions over a tensor's symbols."""

import numpy as np
import torch

UNIT = 1 << 16
"""Pseudo-counts that make one count."""

_SCALES, _POWERS, _STRENGTHS = 16, 3, (1, 4, 16, 64, 256)

PRIORS = _SCALES * _POWERS * len(_STRENGTHS)
"""Number of priors; a prior's code is below it."""


def prior(values, code):
    """Pseudo-counts with which the counting of a block's symbols starts.

    Parameters
    ----------
    values : ndarray
        int64 [k], what can be coded.
    code : int
        Scale, tails and weight of the distribution in one number below :data:`PRIORS`.

    Returns
    -------
    ndarray
        int64 [k], all positive, in units of 1 / :data:`UNIT` counts.
    """
    code, strength = divmod(code, len(_STRENGTHS))
    shape = _student(values, *divmod(code, _POWERS))
    return 1 + shape * (_STRENGTHS[strength] * UNIT) // int(shape.sum())


def candidates(values, counts):
    """All priors of a tensor, prepared for :func:`best_prior`.

    Parameters
    ----------
    values, counts : ndarray
        int64 [k], what can be coded and how often the tensor holds it.

    Returns
    -------
    tuple
        Indices of the values in use [u]; of each prior the pseudo-counts [PRIORS, u], their
        log-gammas and their sum [PRIORS].
    """
    used = np.flatnonzero(counts)
    shapes = [_student(values, *divmod(code, _POWERS)) for code in range(_SCALES * _POWERS)]
    shapes = np.stack([shape[used] / shape.sum() for shape in shapes])
    alpha = np.outer(shapes, _STRENGTHS).reshape(len(shapes), len(used), -1).swapaxes(1, 2)
    alpha = torch.from_numpy(alpha.reshape(PRIORS, len(used)))
    whole = torch.tensor(_STRENGTHS, dtype=torch.float64).repeat(len(shapes))
    return used, alpha, torch.lgamma(alpha), whole


def best_prior(known, counts):
    """The prior under which a block's symbols take the fewest bits.

    Parameters
    ----------
    known : tuple
        From :func:`candidates`.
    counts : ndarray
        int64 [k], how often the block holds each value.

    Returns
    -------
    int
        Code of the prior.

    Notes
    -----
    The length is the Dirichlet-multinomial one,
    ``ln Γ(A + n) - ln Γ(A) - Σ_s [ln Γ(α_s + n_s) - ln Γ(α_s)]``. The scale is searched first, the
    rest next to it.
    """
    used, *priors = known
    counts = torch.from_numpy(counts[used].astype(np.float64))

    def best(codes):
        alpha, log_gamma, whole = (prior[codes] for prior in priors)
        gain = (torch.lgamma(alpha + counts) - log_gamma).sum(1)
        bits = torch.lgamma(whole + counts.sum()) - torch.lgamma(whole) - gain
        return codes.start + int(bits.argmin()) * (codes.step or 1)

    variants = _POWERS * len(_STRENGTHS)
    start = best(slice(variants // 2, None, variants)) // variants * variants
    return best(slice(max(start - variants, 0), start + 2 * variants))


def _student(values, scale, power):
    """Integers in proportion to ``(1 + values²/s²)^-q``, s² = 4^(scale - 4), q = 2^power."""
    tails = 1 + values.astype(np.float64) ** 2 / 4.0 ** (scale - 4)
    for _ in range(power):
        tails = tails * tails
    return np.floor(2.0**24 / tails).astype(np.int64) + 1
