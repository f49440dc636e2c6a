"""Allocation: scores to bits, over all layers at once."""

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from lib.criteria import CRITERIA, relevance_choices
from lib.reconstruct import input_moments
from lib.relevance import scored_weights, unit_sensitivity

_CHANGES = ("root", "shuffled", "reversed")
_SECOND_ORDER = ("taylor", "fisher", "hessian-trace")


def tier_shares(
    scores: dict[str, Tensor],
    masks: dict[str, Tensor],
    widths: tuple[int, ...],
    mean_bits: float,
) -> dict[str, list[float]]:
    """Share out tiers of bits by one ranking of all kept weights of a network.

    Parameters
    ----------
    scores, masks : dict of str to Tensor
        Scores, and bool masks of the weights to share among (True = kept).
    widths : tuple of int
        Bits of the tiers, ascending, the first 0: only removed weights are there.
    mean_bits : float
        Mean width of the kept weights; clipped to the range of the other widths.

    Returns
    -------
    dict of str to list of float
        For each tensor, the share of its kept weights in each tier, lowest scores first.

    Notes
    -----
    Of all shares with the given mean the flattest are taken, ``p_t ~ exp(theta * width_t)``
    (maximum entropy), so that one number says how many bits a network gets.
    """
    usable = np.array(widths[1:], dtype=float)

    def shares(theta: float) -> np.ndarray:
        weights = np.exp(theta * (usable - usable.mean()))
        return weights / weights.sum()

    mean_bits = float(np.clip(mean_bits, usable[0] + 1e-3, usable[-1] - 1e-3))
    parts = shares(brentq(lambda theta: shares(theta) @ usable - mean_bits, -20, 20))
    pooled = torch.cat([scores[name][mask] for name, mask in masks.items()]).sort().values
    ends = [round(len(pooled) * end) for end in np.cumsum(parts)[:-1]]
    limits = pooled[[min(end, len(pooled) - 1) for end in ends]] if len(pooled) else pooled
    result = {}
    for name, mask in masks.items():
        kept = scores[name][mask]
        below = [0.0, *((kept < limit).float().mean().item() for limit in limits), 1.0]
        result[name] = [0.0, *np.diff(below)] if len(kept) else [0.0] * len(parts) + [1.0]
    return result


def unit_weights(
    name: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Weigh the squared error of each output unit by what a criterion says about it.

    Parameters
    ----------
    name : str
        ``lrp-<rule>`` or ``lrp-<rule>/<start>``: the mean square of ``R_k / z_k``; ``alike``: all
        ones; ``root:<name>``: the square roots of a name's values, half way between it and
        ``alike``; ``shuffled:<name>`` and ``reversed:<name>``: the same values, dealt out to the
        units of the network at random or in reverse order (controls); any other criterion: from
        its scores, see Notes.
    model : nn.Module
        The network whose weights will be quantized, BatchNorm folded.
    images, labels : Tensor
        Reference images [N, ...] and labels [N].
    seed : int
        Of the dealing of ``shuffled``.

    Returns
    -------
    dict of str to Tensor
        float32 [units] for each weight, with mean one over all units of the network; so a
        trade-off between damage and bits means the same for each ``name``.

    Notes
    -----
    A criterion that scores weights says about unit k: ``G_k = sum_j |s_kj| / sum_j w_kj^2 H_jj``
    with scores of second order (``fisher``: the mean squared gradient at the unit), and the same
    with ``s^2`` for those of first order.
    """
    change, _, inner = name.partition(":")
    if change in _CHANGES and inner:
        units = unit_weights(inner, model, images, labels, seed)
        pooled = torch.cat(list(units.values()))
        if change == "root":
            pooled = pooled.sqrt()
            pooled /= _positive(pooled.mean())
        elif change == "shuffled":
            pooled = pooled[torch.randperm(len(pooled), generator=_generator(seed))]
        else:
            order = pooled.argsort()
            pooled[order] = pooled[order.flip(0)]
        parts = pooled.split([len(unit) for unit in units.values()])
        return dict(zip(units, parts, strict=True))
    if name == "alike":
        return {key: torch.ones(len(weight)) for key, weight in scored_weights(model).items()}
    if name.startswith("lrp-"):
        rule, start, _ = relevance_choices(name)
        units = unit_sensitivity(model, images, labels, rule=rule, start=start)
    else:
        units = _from_scores(name, model, images, labels)
    mean = _positive(torch.cat(list(units.values())).mean())
    return {key: (unit / mean).float() for key, unit in units.items()}


def criterion_of(name: str) -> str:
    """The criterion, or ``alike``, in a name of ``unit_weights``."""
    *changes, criterion = name.split(":")
    return criterion if set(changes) <= set(_CHANGES) else name


def _positive(mean: Tensor) -> Tensor:
    return mean.clamp_min(torch.finfo(torch.float32).tiny)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _from_scores(name, model, images, labels) -> dict[str, Tensor]:
    scores, units = CRITERIA[name](model, images, labels), {}
    for key, moment in input_moments(model, images).items():
        weight = model.get_parameter(key).detach()
        score = scores[key].abs() if name in _SECOND_ORDER else scores[key].square()
        diagonal = moment.diagonal(dim1=-2, dim2=-1)
        groups = diagonal.shape[0] if diagonal.ndim == 2 else 1
        rows = weight.reshape(groups, len(weight) // groups, -1)
        energy = (rows.square() * diagonal.reshape(groups, 1, -1)).sum(-1).reshape(-1)
        total = score.flatten(1).sum(1)
        units[key] = torch.where(energy > 0, total / energy.clamp_min(1e-30), 0.0)
    return units
