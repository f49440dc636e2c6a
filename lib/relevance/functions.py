"""Torch functions whose relevance is not an ordinary gradient: layers, norms, attention.

Each takes the ``Propagation`` it is called in, the function and the function's own arguments.
"""

import inspect
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from lib.relevance.layers import Embed, Layer
from lib.relevance.operations import Operation
from lib.relevance.rules import Rule


def _linear(mode, func, input, weight, bias=None):
    return mode.layer(input, weight, bias, Operation())


def _convolution(dims: int, transposed: bool):
    def expand(v) -> tuple[int, ...]:
        return (
            tuple(v) * dims
            if isinstance(v, (tuple, list)) and len(v) == 1
            else (tuple(v) if isinstance(v, (tuple, list)) else (v,) * dims)
        )

    def convolve(mode, input, weight, bias, stride, padding, output_padding, groups, dilation):
        dilation = expand(dilation)
        if padding == "valid":
            padding = 0
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if any(t % 2 for t in total):
                input = F.pad(input, [p for t in reversed(total) for p in (0, t % 2)])
            padding = [t // 2 for t in total]
        options = (expand(stride), expand(padding), dilation)
        options += (transposed, expand(output_padding), groups)
        return mode.layer(input, weight, bias, Operation(options))

    def ordinary(mode, func, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        return convolve(mode, input, weight, bias, stride, padding, 0, groups, dilation)

    def transposing(
        mode, func, input, weight, bias=None, stride=1, padding=0, output_padding=0,
        groups=1, dilation=1,
    ):  # fmt: skip
        return convolve(
            mode, input, weight, bias, stride, padding, output_padding, groups, dilation
        )

    return transposing if transposed else ordinary


def _embedding(mode, func, input, weight, padding_idx=None, max_norm=None, *args, **kw):
    if max_norm is not None:
        raise mode.refuse("an embedding with max_norm", "set max_norm to None")
    layer = Layer(Operation(), Rule(), mode.sink, mode.key(weight))
    mode.visited[mode.path[-1]] = layer.rule
    rows = Embed.apply(input, mode.anchor, weight, mode.sink.use(layer, input))
    if layer.layout is None:
        rows.lookup = (input, mode.anchor, weight, layer)
    return rows


def spread(mode, terms):
    """Look rows that all samples share up once per sample where they are added to samples."""
    shared = [i for i, t in enumerate(terms) if hasattr(t, "lookup") and mode.sink.samplewise]
    if len(shared) != 1 or len(terms) != 2:
        return terms
    indices, anchor, weight, layer = terms[shared[0]].lookup
    layer = replace(layer, layout=(0, False))
    rows = Embed.apply(indices.expand(terms[1 - shared[0]].shape[:-1]), anchor, weight, layer)
    return [rows if i in shared else t for i, t in enumerate(terms)]


def _batch_norm(
    mode, func, input, mean, var, weight=None, bias=None, training=False,
    momentum=0.1, eps=1e-5, *args,
):  # fmt: skip
    if mean is None or training:
        raise mode.refuse("BatchNorm with batch statistics", "set track_running_stats")
    scale = torch.rsqrt(var + eps) * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    shape = (1, -1, *[1] * (input.dim() - 2))
    return input * scale.view(shape) + shift.view(shape)


def _standardise(x, dims, eps, weight, bias, centre=True):
    """Normalisation whose scale is a constant to relevance (Ali et al. 2022, ICML)."""
    x = x - x.mean(dims, keepdim=True) if centre else x
    x = x * torch.rsqrt(x.detach().square().mean(dims, keepdim=True) + eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _layer_norm(mode, func, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    dims = tuple(range(-len(normalized_shape), 0))
    return _standardise(input, dims, eps, weight, bias)


def _rms_norm(mode, func, input, normalized_shape, weight=None, eps=None):
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _standardise(input, dims, eps, weight, None, centre=False)


def _group_norm(mode, func, input, num_groups, weight=None, bias=None, eps=1e-5):
    grouped = input.unflatten(1, (num_groups, -1))
    dims = tuple(range(2, grouped.dim()))
    shape = (1, -1, *[1] * (input.dim() - 2))
    weight, bias = (v if v is None else v.view(shape) for v in (weight, bias))
    x = _standardise(grouped, dims, eps, None, None).flatten(1, 2)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _attend(mode, q, k, v, mask, scale):
    """AttnLRP: equal halves at both products, the softmax by its Taylor rule."""
    scores = mode.half(q @ k.mT) * scale
    if mask is not None:
        allowed = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if allowed else scores + mask
    weights = scores.softmax(-1)
    return mode.half(weights @ v), weights


def _sdpa(
    mode, func, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False,
    scale=None, enable_gqa=False,
):  # fmt: skip
    if enable_gqa:
        raise mode.refuse("grouped-query attention", "repeat keys and values explicitly")
    if is_causal:
        attn_mask = query.new_ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _attend(mode, query, key, value, attn_mask, scale)[0]


def _multi_head_attention(mode, func, *args, **kwargs):
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    p = bound.arguments
    if p["bias_k"] is not None or p["add_zero_attn"] or p["query"].dim() != 3:
        raise mode.refuse("attention with bias_k, add_zero_attn or without a batch axis")
    heads, width = p["num_heads"], p["query"].shape[-1]
    inputs = (p["query"], p["key"], p["value"])
    biases = (None,) * 3 if p["in_proj_bias"] is None else p["in_proj_bias"].chunk(3)
    if p["use_separate_proj_weight"]:
        weights = [p[f"{n}_proj_weight"] for n in "qkv"]
        keys = [mode.key(w) for w in weights]
    else:
        weights = p["in_proj_weight"].chunk(3)
        name = mode.key(p["in_proj_weight"])[0]
        keys = [(name, i * width, (i + 1) * width) for i in range(3)]
    q, k, v = (
        mode.layer(x.transpose(0, 1), w, b, Operation(), key).unflatten(-1, (heads, -1))
        .transpose(1, 2)
        for x, w, b, key in zip(inputs, weights, biases, keys, strict=True)
    )  # fmt: skip
    mask = torch.zeros(len(q), 1, 1, k.shape[2], dtype=q.dtype, device=q.device)
    for given, shape in ((p["key_padding_mask"], (len(q), 1, 1, -1)), (p["attn_mask"], None)):
        if given is None:
            continue
        if given.dtype == torch.bool:
            given = torch.zeros_like(given, dtype=q.dtype).masked_fill(given, -torch.inf)
        if given.dim() == 3:
            given = given.unflatten(0, (len(q), heads))
        mask = mask + (given.view(shape) if shape else given)
    out, attention = _attend(mode, q, k, v, mask, 1 / math.sqrt(q.shape[-1]))
    out = out.transpose(1, 2).flatten(2)
    out = mode.layer(out, p["out_proj_weight"], p["out_proj_bias"], Operation())
    attention = attention.mean(1) if p["average_attn_weights"] else attention
    return out.transpose(0, 1), attention if p["need_weights"] else None


LAYERS = {
    "linear": _linear,
    **{f"conv{d}d": _convolution(d, False) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": _convolution(d, True) for d in (1, 2, 3)},
    "embedding": _embedding,
    "scaled_dot_product_attention": _sdpa,
    "multi_head_attention_forward": _multi_head_attention,
}
NORMALISATIONS = {
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
}
