"""Normalisations and gated units, written as functions whose relevance is an ordinary gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .factors import Gate
from .functions import Forward
from .layers import Activate


def _batch_norm(
    mode: Forward, input: Tensor, mean: Tensor | None, var: Tensor,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5, *args: Any,
) -> Tensor:  # fmt: skip
    if (mean is None or training) and hasattr(input, "computed"):
        dims = (0, *range(2, input.dim()))  # of a weight: weight standardisation
        shape = (1, -1, *[1] * (input.dim() - 2))
        weight, bias = (v if v is None else v.view(shape) for v in (weight, bias))
        return _affine(mode, _standardise(input, dims, eps), weight, bias)
    if mean is None or training:
        raise mode.refuse("BatchNorm with batch statistics", "set track_running_stats")
    scale = torch.rsqrt(var + eps) * (1 if weight is None else weight)  # [channels]
    shift = (0 if bias is None else bias) - mean * scale  # [channels]
    shape = (1, -1, *[1] * (input.dim() - 2))
    scaled = mode.__torch_function__(torch.mul, (), (input, scale.view(shape)), {})
    return mode.__torch_function__(torch.add, (), (scaled, shift.view(shape)), {})


def _standardise(x: Tensor, dims: tuple[int, ...], eps: float, centre: bool = True) -> Tensor:
    """Normalisation whose scale is a constant to relevance (Ali et al. 2022, ICML)."""
    x = x - x.mean(dims, keepdim=True) if centre else x
    return x * torch.rsqrt(x.detach().square().mean(dims, keepdim=True) + eps)


def _affine(mode: Forward, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = mode.half(x * weight) if weight.requires_grad else x * weight
    return x if bias is None else x + bias


def _layer_norm(
    mode: Forward, input: Tensor, normalized_shape: Sequence[int],
    weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    dims = tuple(range(-len(normalized_shape), 0))
    return _affine(mode, _standardise(input, dims, eps), weight, bias)


def _rms_norm(
    mode: Forward, input: Tensor, normalized_shape: Sequence[int],
    weight: Tensor | None = None, eps: float | None = None,
) -> Tensor:  # fmt: skip
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(mode, _standardise(input, dims, eps, centre=False), weight, None)


def _group_norm(
    mode: Forward, input: Tensor, num_groups: int,
    weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    grouped = input.unflatten(1, (num_groups, -1))  # [samples, groups, channels / groups, ...]
    dims = tuple(range(2, grouped.dim()))
    shape = (1, -1, *[1] * (input.dim() - 2))
    weight, bias = (v if v is None else v.view(shape) for v in (weight, bias))
    return _affine(mode, _standardise(grouped, dims, eps).flatten(1, 2), weight, bias)


def _instance_norm(
    mode: Forward, input: Tensor, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not use_input_stats:
        assert running_var is not None
        return _batch_norm(mode, input, running_mean, running_var, weight, bias, eps=eps)
    return _group_norm(mode, input, input.shape[1], weight, bias, eps)


def _normalize(
    mode: Forward, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if out is not None:
        raise mode.refuse("normalize into a tensor given as out", "use what it returns")
    return input / input.detach().norm(p, dim, keepdim=True).clamp_min(eps)


def _weight_norm(mode: Forward, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v.detach(), 2, dim))


def _cosine_similarity(
    mode: Forward, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8
) -> Tensor:
    both = x1.requires_grad and x2.requires_grad
    one, other = (_normalize(mode, x, 2.0, dim, eps) for x in torch.broadcast_tensors(x1, x2))
    product = one * other
    return (mode.half(product) if both else product).sum(dim)


def _glu(mode: Forward, input: Tensor, dim: int = -1) -> Tensor:
    signal, x = input.chunk(2, dim)
    with torch.no_grad():
        value = x.sigmoid()
    gate = Activate.apply(x, value)
    gate.factor = Gate.of(x, gate, "sigmoid")
    return mode.product(signal, gate)


NORMALISATIONS: dict[str, Callable] = {
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "normalize": _normalize,
    "weight_norm": _weight_norm,
    "cosine_similarity": _cosine_similarity,
    "glu": _glu,
}
