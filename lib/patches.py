"""What the units of a layer read, as columns of patches; products of these, summed."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fold import TRANSPOSED
from .linear import Layer

POSITIONS = 1024  # of a convolution's output that moments are taken from in one image
PORTION = 2**23  # values of patches held at a time: of more, the system's paging costs most


def patches_of(layer: Any, inputs: Tensor, few: bool = False) -> Tensor:
    """Patches as columns [groups, d + 1, images · positions]; the last row is one, for the bias.

    With ``few`` those at the places ``chosen``, all of it scaled so that sums of products over
    them stand for sums over all.
    """
    scale, inputs = 1.0, batched(layer, inputs)
    if isinstance(layer, nn.Linear):
        columns, k = inputs.reshape(1, -1, inputs.shape[-1]).mT, 0
    else:
        columns, k = _convolved(layer, inputs), len(layer.kernel_size)
        if few:
            *where, scale = chosen(columns.shape[2 : 2 + k])
            columns = columns[(slice(None), slice(None), *where)]
            k = k if scale == 1 else 1
        # [images, groups, channels, *places, *taps] -> [groups, channels, *taps, images, *places]
        columns = columns.unflatten(1, (layer.groups, -1))
        columns = columns.permute(1, 2, *range(3 + k, columns.dim()), 0, *range(3, 3 + k))
    taps, places = columns.shape[1 : -1 - k], columns.shape[-1 - k :]
    patches = inputs.new_empty(len(columns), taps.numel() + 1, places.numel())
    patches[:, :-1].unflatten(1, taps).unflatten(-1, places).copy_(columns)
    patches[:, -1] = 1
    return patches if scale == 1 else patches.mul_(scale)


def batched(layer: Any, values: Tensor) -> Tensor:
    """What a linear or convolutional layer reads or gives, with an axis of samples if it has none.

    That is [1, channels, *places] of [channels, *places].
    """
    return values[None] if values.dim() == 1 + len(getattr(layer, "kernel_size", ())) else values


def portion(layer: Any, inputs: Tensor) -> int:
    """Images whose patches are held at a time, all of ``few``."""
    inside = inputs[0].numel()
    if not isinstance(layer, nn.Linear):  # about: strides and padding aside
        places = min(POSITIONS, inside // len(inputs[0]))
        inside = len(inputs[0]) * math.prod(layer.kernel_size) * places
    return max(1, PORTION // max(1, inside))


def chosen(places: Iterable[int]) -> tuple[Any, ...]:
    """At most ``POSITIONS`` places, drawn once for each shape, and the root of all to these.

    A slice for each axis where that is all of them, otherwise an index.
    """
    shape = tuple(places)
    count = math.prod(shape)
    if count <= POSITIONS:
        return (*(slice(None) for _ in shape), 1.0)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:POSITIONS]
    return (*torch.unravel_index(order.sort().values, shape), math.sqrt(count / POSITIONS))


def _convolved(layer: Any, inputs: Any) -> Tensor:
    """What each tap reads at each place of the output [images, channels, *places, *taps]."""
    steps, k = layer.stride, len(layer.kernel_size)
    transposed = isinstance(layer, TRANSPOSED)
    if transposed:
        # zeros between the inputs, then a convolution of stride one with its taps reversed
        shape = [(n - 1) * step + 1 for n, step in zip(inputs.shape[2:], steps, strict=True)]
        spread = inputs.new_zeros(*inputs.shape[:2], *shape)
        spread[(..., *(slice(None, None, step) for step in steps))] = inputs
        pads: list[int] = []
        sizes = zip(layer.kernel_size, layer.dilation, layer.padding, strict=True)
        for (size, gap, pad), more in zip(sizes, layer.output_padding, strict=True):
            reach = gap * (size - 1) - pad
            pads = [reach, reach + more, *pads]
        columns, steps = F.pad(spread, pads), (1,) * k
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        columns = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    sizes = zip(layer.kernel_size, layer.dilation, steps, strict=True)
    for axis, (size, gap, step) in enumerate(sizes, 2):
        columns = columns.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]
    return columns.flip(tuple(range(-k, 0))) if transposed else columns


def units_of(layer: Layer, outputs: Tensor, few: bool = False) -> Tensor:
    """Pre-activations [groups, units, images · positions], of layers other than embeddings.

    ``few`` as of ``patches_of``.
    """
    if isinstance(layer, nn.Linear):
        return outputs.reshape(1, -1, outputs.shape[-1]).mT
    assert not isinstance(layer, nn.Embedding)
    outputs = batched(layer, outputs)
    if few:
        *where, scale = chosen(outputs.shape[2:])
        outputs = outputs[(slice(None), slice(None), *where)]
        outputs = outputs if scale == 1 else outputs * scale
    return outputs.flatten(2).unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3).flatten(2)


def gram(
    layer: Layer, inputs: Tensor, dtype: torch.dtype | None = None, most: int | None = None
) -> Tensor:
    """Products of the inputs and a one, summed over positions [groups, d + 1, d + 1].

    Of convolutions over large images ``POSITIONS`` of each image stand for all; of more than
    ``most`` inputs the channels that hold the first so many.
    """
    if isinstance(layer, nn.Embedding):
        counts = look_ups(layer, inputs).to(dtype or layer.weight.dtype)
        every = counts.sum().expand_as(counts)
        return torch.stack([counts, counts, counts, every], 1).unflatten(1, (2, 2))
    inputs = batched(layer, inputs)
    if most is not None and getattr(layer, "groups", 1) == 1:
        channels = math.ceil(most / math.prod(getattr(layer, "kernel_size", ())))
        axis = inputs.dim() - 1 if isinstance(layer, nn.Linear) else 1
        inputs = inputs.narrow(axis, 0, min(channels, inputs.shape[axis]))
    patches = (patches_of(layer, i, few=True) for i in inputs.split(portion(layer, inputs)))
    return torch.stack([squared(some.to(dtype or some.dtype)) for some in patches]).sum(0)


def squared(rows: Tensor, size: int = 512) -> Tensor:
    """``rows @ rows.mT`` of [groups, d, n], of which only what is needed of both halves."""
    product = rows.new_empty(*rows.shape[:2], rows.shape[1])
    for start in range(0, rows.shape[1], size):
        stop = start + size
        product[:, start:stop, :stop] = rows[:, start:stop] @ rows[:, :stop].mT
        product[:, :start, start:stop] = product[:, start:stop, :start].mT
        square = product[:, start:stop, start:stop]  # on some processors not quite symmetric
        square.copy_(square.tril() + square.tril(-1).mT)
    return product


def look_ups(layer: Any, inputs: Tensor) -> Tensor:
    """How often each token is looked up, int64 [tokens]."""
    return inputs.flatten().bincount(minlength=layer.num_embeddings)
