"""Masks: which weights are kept, made from scores, joined, counted and applied.

Scores are ``dict[str, Tensor]`` keyed by the weight's name; a mask has the same names and shapes,
dtype bool, True = kept. All counts are exact, and ties are broken by position: of equal scores the
earlier weight (in the order of the names, then row-major) ranks higher. What makes masks raises
ValueError if there are no scores, one holds NaN, a share is outside [0, 1] or a mask misfits.
"""

import copy

import torch
from torch import Tensor, nn

from .score import Scores, pooled, unpooled

Mask = dict[str, Tensor]


def nonpositive(scores: Scores, fraction: float = 1.0, *, mask: Mask | None = None) -> Mask:
    """Remove every weight whose score is zero or negative, or those of them nearest zero.

    Of n such weights ``round(fraction · n)`` go, the nearest to zero over all layers at once. What
    `mask` removed in earlier rounds stays removed and does not count: its score is zero because
    the weight is, not because it was found unimportant.

    Notes
    -----
    All at once it is the paper's rule taken literally: a layer without a positive score loses all
    its weights, which disconnects the network. With a fraction, it is one round of gradual
    removal: score, remove the nearest, refit or fine-tune, score again.

    References
    ----------
    Soroush, Raji, Ghavami: Compressing Deep Neural Networks Using Explainable AI,
    arXiv:2507.05286, abstract.
    """
    scores, fraction = _checked(scores), check_share("fraction", fraction)
    before = intersect(_everything(scores), mask or {})
    flat, kept = pooled(scores), pooled({name: before[name] for name in scores})
    candidates = ((flat <= 0) & kept).nonzero().squeeze(1)
    nearest = _top(flat[candidates], round(fraction * len(candidates)))
    kept[candidates[nearest]] = False
    return intersect(before, unpooled(kept, scores))


def keep_top(scores: Scores, fraction: float, *, scope: str = "global") -> Mask:
    """Keep the given fraction of the weights, highest scores first.

    ``round(fraction · n)`` of the n that are ranked together: with the scope "global" those of all
    layers, with "layer" each layer's among themselves. Every layer keeps at least its best weight,
    because a layer without weights disconnects the network.
    """
    scores, fraction = _checked(scores), check_share("fraction", fraction)
    if check_scope(scope) == "layer":
        return {name: _best(score, fraction) for name, score in scores.items()}
    flat, kept = pooled(scores), pooled({name: _best(score, 0) for name, score in scores.items()})
    kept[~kept] = _top(flat[~kept], round(fraction * len(flat)) - int(kept.sum()))
    return unpooled(kept, scores)


def filters(scores: Scores, fraction: float) -> Mask:
    """Keep a fraction of each convolution's filters, highest sums of scores first.

    Filters are the rows of weights [out channels, in channels per group, *kernel]; at least one
    stays in each layer. The weights of all other layers are kept.

    References
    ----------
    Sabih, Hannig, Teich: Utilizing Explainable AI for Quantization and Pruning of Deep Neural
    Networks, arXiv:2008.09072: structured pruning of filters, unstructured of fully connected
    layers. That a filter's importance is the sum of its weights' is our reading.
    """
    scores, fraction = _checked(scores), check_share("fraction", fraction)
    sums = {name: score.flatten(1).sum(1) for name, score in scores.items() if score.ndim > 2}
    masks = _everything(scores)
    for name, total in sums.items():
        masks[name][~_best(total, fraction)] = False
    return masks


def intersect(*masks: Mask) -> Mask:
    """Keep what all masks keep; a mask says nothing about names it does not hold.

    ValueError if masks of one name differ in shape, or are not bool.
    """
    joint: Mask = {}
    for mask in masks:
        for name, kept in mask.items():
            _check_mask(name, kept, joint.get(name, kept).shape)
            joint[name] = joint[name] & kept if name in joint else kept.clone()
    return joint


def apply(model: nn.Module, masks: Mask) -> nn.Module:
    """A copy of a model with the removed weights set to exactly zero.

    ValueError if a mask's name is no parameter, or its shape or dtype does not fit.
    """
    pruned = copy.deepcopy(model)
    for name, parameter in masked(pruned, masks).items():
        parameter.data.masked_fill_(~masks[name].to(parameter.device), 0)
    return pruned


def masked(model: nn.Module, masks: Mask) -> dict[str, nn.Parameter]:
    """The parameters that masks name; ValueError for a mask that does not fit the model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, kept in masks.items():
        if name not in parameters:
            raise ValueError(f"mask {name!r}: the model has no such parameter")
        _check_mask(name, kept, parameters[name].shape)
    return {name: parameters[name] for name in masks}


def density(masks: Mask) -> float:
    """Share of the weights that masks keep, in [0, 1]; 1 if there are none."""
    total = sum(kept.numel() for kept in masks.values())
    return sum(int(kept.sum()) for kept in masks.values()) / total if total else 1.0


def _best(score: Tensor, fraction: float) -> Tensor:
    """Mask of the highest values of one tensor, that share of them, at least one."""
    return _top(score.reshape(-1), max(1, round(fraction * score.numel()))).reshape(score.shape)


def _top(flat: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` highest of n values; of equal ones the first."""
    if count <= 0:
        return torch.zeros_like(flat, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    kept = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    kept[ties[: count - int(kept.sum())]] = True
    return kept


def _everything(scores: Scores) -> Mask:
    return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}


def _checked(scores: Scores) -> Scores:
    if not scores:
        raise ValueError("there are no scores to prune by")
    for name, score in scores.items():
        if not score.numel():
            raise ValueError(f"scores of {name!r} are empty")
        if score.isnan().any():
            raise ValueError(f"scores of {name!r} hold NaN")
    return {name: score.detach() for name, score in scores.items()}


def _check_mask(name: str, kept: Tensor, shape: torch.Size) -> None:
    if kept.dtype != torch.bool:
        raise ValueError(f"mask {name!r} must be bool, not {kept.dtype}")
    if kept.shape != shape:
        raise ValueError(f"mask {name!r} is {list(kept.shape)}, its weight {list(shape)}")


def check_share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} {value} is outside [0, 1]")
    return value


def check_scope(scope: str) -> str:
    if scope not in ("global", "layer"):
        raise ValueError(f"unknown scope {scope!r}; known: global, layer")
    return scope
