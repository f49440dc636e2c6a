"""Torch functions whose relevance is no ordinary gradient; each takes the pass it is called in."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import UnsupportedLayerError
from .layers import Collector, Embed, Key, Layer
from .operations import Operation
from .origins import Origins
from .rules import Rule

Size = int | Sequence[int]


class Forward(Protocol):
    """The forward pass under way, as these functions know it: ``trace.Propagation``."""

    collector: Collector
    images: Tensor
    origins: Origins
    readers: list[str]
    spreads: dict[int, tuple[torch.Size, int]]
    number: int
    anchor: Tensor
    leaves: dict[Key, Tensor]
    made: dict[Any, str]

    def layer(
        self, a: Tensor, w: Tensor, b: Tensor | None, operation: Operation, key: Key | None = None
    ) -> Tensor: ...
    def use(self, a: Tensor, operation: Operation, rule: Rule, key: Key | None) -> Layer: ...
    def key(self, w: Tensor) -> Key | None: ...
    def half(self, x: Tensor) -> Tensor: ...
    def product(self, one: Tensor, other: Tensor) -> Tensor: ...
    def refuse(self, what: str, advice: str = "") -> UnsupportedLayerError: ...
    def __torch_function__(self, func: Any, types: Any, args: tuple, kwargs: dict) -> Any: ...


def _linear(mode: Forward, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dim() == 1:  # one unit
        weight = computed_as(weight[None], weight)
        bias = None if bias is None else bias[None]
        return _linear(mode, input, weight, bias)[..., 0]
    if input.dim() == 1:  # one sample without an axis of its own
        return mode.layer(input[None], weight, bias, Operation())[0]
    return mode.layer(input, weight, bias, Operation())


def computed_as(view: Tensor, weight: Tensor) -> Tensor:
    """A view of a weight, with the mark of one that was computed where it has that."""
    if hasattr(weight, "computed"):
        view.computed = weight.computed  # type: ignore[attr-defined]
    return view


def _convolution(dims: int, transposed: bool) -> Callable[..., Tensor]:
    def expand(value: Size) -> tuple[int, ...]:
        sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        return sizes * dims if len(sizes) == 1 else sizes

    def convolve(
        mode: Forward, input: Tensor, weight: Tensor, bias: Tensor | None = None,
        stride: Size = 1, padding: Size | str = 0, dilation: Size = 1, groups: int = 1,
        output_padding: Size = 0,
    ) -> Tensor:  # fmt: skip
        dilation, after = expand(dilation), (0,) * dims  # zeros behind the input
        if padding == "valid":
            padding = 0
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            padding, after = [t // 2 for t in total], tuple(t % 2 for t in total)
        assert not isinstance(padding, str)
        options = (
            expand(stride), expand(padding), dilation, transposed, expand(output_padding), groups,
        )  # fmt: skip
        if input.dim() == dims + 1:  # one sample without an axis of its own
            return mode.layer(input[None], weight, bias, Operation(options, after))[0]
        return mode.layer(input, weight, bias, Operation(options, after))

    def transpose(
        mode: Forward, input: Tensor, weight: Tensor, bias: Tensor | None = None,
        stride: Size = 1, padding: Size = 0, output_padding: Size = 0, groups: int = 1,
        dilation: Size = 1,
    ) -> Tensor:  # fmt: skip
        return convolve(
            mode, input, weight, bias, stride, padding, dilation, groups, output_padding
        )

    return transpose if transposed else convolve


def _embedding(
    mode: Forward, input: Tensor, weight: Tensor, padding_idx: int | None = None,
    max_norm: float | None = None, *args: Any, **kwargs: Any,
) -> Tensor:  # fmt: skip
    if max_norm is not None:
        raise mode.refuse("an embedding with max_norm", "set max_norm to None")
    return look_up(mode, input, weight, mode.key(weight))


def look_up(mode: Forward, indices: Tensor, weight: Tensor, key: Key | None) -> Tensor:
    """Rows [..., width] of a weight, to which relevance returns."""
    layer = mode.use(indices, Operation(), Rule(), key)
    rows = Embed.apply(indices, mode.anchor, weight, layer)  # [..., width]
    mode.made[rows.grad_fn] = name = key[0] if key else ""
    mode.readers += [name] if mode.origins.raw(indices) else []
    rows.looked, rows.lookup = (layer,), (indices, mode.anchor, weight, layer)
    return rows


def stored(mode: Forward, weight: Tensor, key: Key) -> Tensor:
    """A weight from which the one of a layer is computed, connected to the collector once."""
    if key in mode.leaves:
        return mode.leaves[key]
    every = torch.arange(len(weight), device=weight.device)
    layer = Layer(Operation(), Rule(), mode.collector, key, None, stored=True)
    mode.collector.use(layer, every)
    value = Embed.apply(every, mode.anchor, weight, layer)  # like the weight
    value.computed = set()
    mode.leaves[key], mode.made[value.grad_fn] = value, key[0]
    return value


def looked_up_per_sample(mode: Forward, summands: Sequence[Any]) -> Sequence[Any]:
    """Look rows that all samples share up once per sample where they are added to samples."""
    looked = [t for t in summands if hasattr(t, "lookup")]
    if not mode.collector.samplewise or not looked or len(summands) != 2:
        return summands
    shape = torch.broadcast_shapes(*(t.shape for t in summands))
    number = mode.number = mode.number + 1
    followed, count = mode.spreads.setdefault(number, (shape, len(mode.images)))
    shared = [t for t in looked if t.lookup[3].layout is None]
    if len(shared) != 1:
        return summands
    other = summands[0] if summands[1] is shared[0] else summands[1]
    if not getattr(other, "requires_grad", False) or hasattr(other, "computed"):
        return summands  # no sample's own
    indices, anchor, weight, layer = shared[0].lookup
    every = indices.expand(shape[:-1])  # of samples and positions, whichever come first
    ratio = len(mode.images) / count
    sizes = enumerate(zip(followed[:-1], every.shape, strict=False))
    axes = [axis for axis, (one, all_) in sizes if one == count and all_ == one * ratio]
    layer = replace(layer, layout=(axes[0], False) if len(axes) == 1 else None)
    rows = Embed.apply(every, anchor, weight, layer)  # [..., width]
    mode.made[rows.grad_fn] = layer.place[0]
    return [rows if t is shared[0] else t for t in summands]


def _attend(
    mode: Forward, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """AttnLRP: equal halves at both products, the softmax by its Taylor rule.

    q [samples, heads, queries, d], k and v [samples, heads, keys, d].
    """
    scores = mode.half(q @ k.mT) * scale  # [samples, heads, queries, keys]
    if mask is None:
        weights = scores.softmax(-1)
    else:
        allowed = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if allowed else scores + mask
        blind = (scores == -torch.inf).all(-1, keepdim=True)  # as torch has it, these read nothing
        weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return mode.half(weights @ v), weights  # [samples, heads, queries, d]


def _sdpa(
    mode: Forward, query: Tensor, key: Tensor, value: Tensor,
    attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa:  # each head of keys and values is read by several of queries
        groups = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
    if is_causal:
        attn_mask = query.new_ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _attend(mode, query, key, value, attn_mask, scale)[0]


def _multi_head_attention(mode: Forward, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    bound.apply_defaults()
    p = bound.arguments
    if p["bias_k"] is not None or p["add_zero_attn"] or p["query"].dim() != 3:
        raise mode.refuse("attention with bias_k, add_zero_attn or without a batch axis")
    heads, width = p["num_heads"], p["query"].shape[-1]
    inputs = (p["query"], p["key"], p["value"])  # [positions, samples, width] each
    biases = (None,) * 3 if p["in_proj_bias"] is None else p["in_proj_bias"].chunk(3)
    keys: list[Key | None]
    if p["use_separate_proj_weight"]:
        weights = [p[f"{n}_proj_weight"] for n in "qkv"]
        keys = [mode.key(w) for w in weights]
    else:
        weights = p["in_proj_weight"].chunk(3)
        whole = mode.key(p["in_proj_weight"])
        keys = [whole and (whole[0], i * width, (i + 1) * width) for i in range(3)]
    q, k, v = (
        mode.layer(x.transpose(0, 1), w, b, Operation(), key).unflatten(-1, (heads, -1))
        .transpose(1, 2)
        for x, w, b, key in zip(inputs, weights, biases, keys, strict=True)
    )  # [samples, heads, positions, width / heads] each  # fmt: skip
    mask = None
    for given, shape in ((p["key_padding_mask"], (len(q), 1, 1, -1)), (p["attn_mask"], None)):
        if given is None:
            continue
        if given.dtype == torch.bool:
            given = torch.zeros_like(given, dtype=q.dtype).masked_fill(given, -torch.inf)
        if given.dim() == 3:
            given = given.unflatten(0, (len(q), heads))
        given = given.view(shape) if shape else given
        mask = given if mask is None else mask + given
    out, attention = _attend(mode, q, k, v, mask, 1 / math.sqrt(q.shape[-1]))
    out = out.transpose(1, 2).flatten(2)  # [samples, positions, width]
    out = mode.layer(out, p["out_proj_weight"], p["out_proj_bias"], Operation())
    attention = attention.mean(1) if p["average_attn_weights"] else attention
    return out.transpose(0, 1), attention if p["need_weights"] else None


LAYERS: dict[str, Callable] = {
    "linear": _linear,
    **{f"conv{d}d": _convolution(d, False) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": _convolution(d, True) for d in (1, 2, 3)},
    "embedding": _embedding,
    "scaled_dot_product_attention": _sdpa,
    "multi_head_attention_forward": _multi_head_attention,
}
