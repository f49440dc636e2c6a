"""Layers as linear maps: the rows of their weights, what these read, what they put out.

Linear, embedding, convolutional and transposed convolutional layers of any stride, padding,
dilation and grouping are handled, where they compute what torch's layers of these types do; so are
the projections inside of ``nn.MultiheadAttention``, in a network that is ``attention.opened``.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fold import TRANSPOSED
from .inputs import FullPrecision, full_precision, own, split

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding | Transposed
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, *TRANSPOSED)
POSITIONS = 1024  # of a convolution's output that moments are taken from in one image
PORTION = 2**23  # values of patches held at a time: of more, the system's paging costs most


@dataclass(frozen=True)
class View:
    """A weight as rows [groups, rows, inputs]: each unit's output is its row times the inputs.

    An embedding reads which token there is: each token is a group of one input, its row has one
    unit for each column.
    """

    groups: int
    inputs: int
    turned: bool = False  # a transposed convolution's [inputs, units / groups, ...]
    looks_up: bool = False

    @classmethod
    def of(cls, layer: Any) -> "View":
        """How this layer's weight is read."""
        weight: Tensor = layer.weight
        if isinstance(layer, nn.Embedding):
            return cls(len(weight), 1, looks_up=True)
        groups = getattr(layer, "groups", 1)
        if isinstance(layer, TRANSPOSED):
            return cls(groups, weight[:, 0].numel() // groups, True)
        return cls(groups, weight[0].numel())

    def rows(self, weight: Tensor) -> Tensor:
        """The weight, or what is shaped like it, as [groups, rows, inputs]."""
        if self.turned:
            weight = weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
        return weight.reshape(self.groups, -1, self.inputs)

    def weight(self, rows: Tensor, shape: Iterable[int]) -> Tensor:
        """The inverse of ``rows``, for a weight of that shape."""
        shape = tuple(shape)
        if not self.turned:
            return rows.reshape(shape)
        units = shape[0] // self.groups, *shape[2:]  # of the inputs of a group, and its taps
        return rows.reshape(self.groups, shape[1], *units).transpose(1, 2).reshape(shape)

    def units(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Weights of the units, as of ``Criterion.units``, for rows: [groups · rows].

        Those of embeddings count its tokens, whatever the column.
        """
        weights = weights.reshape(self.groups, -1)
        if self.looks_up:  # nothing is known of tokens at zero
            known = weights > 0
            weights = torch.where(known, weights, weights.sum() / known.sum().clamp(min=1))
        return weights.expand(self.groups, rows.shape[1]).reshape(-1)


@dataclass(frozen=True)
class Place:
    """Where a layer's weight is stored: rows first to last, all by default, of a parameter."""

    name: str
    first: int | None = None
    last: int | None = None

    @classmethod
    def of(cls, path: str, layer: Layer) -> "Place":
        """That of the layer at a module path, which is empty for a bare layer."""
        if isinstance(layer, Projection):
            stem = path.rpartition(".")[0]
            return cls(f"{stem}.{layer.stored}", layer.first, layer.first + len(layer.weight))
        return cls(f"{path}.weight" if path else "weight")

    def __call__(self, stored: Tensor) -> Tensor:
        """The same rows of what is shaped like the parameter, or has an entry for each row."""
        return stored[self.first : self.last]


class Projection(nn.Linear):
    """Rows of an attention's in-projection, whose memory it shares."""

    def __init__(self, stored: str, first: int, weight: Tensor, bias: Tensor | None):
        units, inputs = weight.shape
        super().__init__(inputs, units, bias=bias is not None, device="meta")
        self.stored, self.first = stored, first
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """Layers whose inputs and units are known here, by module path.

    Not those of subclasses that compute something else, nor embeddings of which another layer
    reads the weight, or that change it as they run.
    """
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, KINDS) and _is_torchs(layer)
        and not (isinstance(layer, nn.Embedding)
                 and (layer.max_norm is not None or owners[id(layer.weight)] > 1))
    }  # fmt: skip


def _is_torchs(layer: Layer) -> bool:
    """Whether it computes what its type says, from its own weight: subclasses need not."""
    kind = next(k for k in KINDS if isinstance(layer, k))
    forward = getattr(layer.forward, "__func__", None)
    inner = getattr(type(layer), "_conv_forward", None) is getattr(kind, "_conv_forward", None)
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return forward is kind.forward and inner and not hooks and "weight" in layer._parameters


def bias_of(layer: Layer) -> Tensor | None:
    """Its bias, if there is one."""
    return None if isinstance(layer, nn.Embedding) else layer.bias


def patches_of(layer: Any, inputs: Tensor, few: bool = False) -> Tensor:
    """Patches as columns [groups, d + 1, images · positions]; the last row is one, for the bias.

    With ``few`` those at the places ``chosen``, all of it scaled so that sums of products over
    them stand for sums over all.
    """
    scale = 1.0
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
    if most is not None and getattr(layer, "groups", 1) == 1:
        channels = math.ceil(most / math.prod(getattr(layer, "kernel_size", ())))
        axis = inputs.dim() - 1 if isinstance(layer, nn.Linear) else 1
        inputs = inputs.narrow(axis, 0, min(channels, inputs.shape[axis]))
    patches = (patches_of(layer, i, few=True) for i in inputs.split(portion(layer, inputs)))
    return torch.stack([squared(some.to(dtype or some.dtype)) for some in patches]).sum(0)


def squared(rows: Tensor, size: int = 512) -> Tensor:
    """``rows @ rows.mT`` of [groups, d, n], of which only what is needed of both halves."""
    if rows.shape[1] <= size:
        return rows @ rows.mT
    product = rows.new_empty(*rows.shape[:2], rows.shape[1])
    for start in range(0, rows.shape[1], size):
        stop = start + size
        product[:, start:stop, :stop] = rows[:, start:stop] @ rows[:, :stop].mT
        product[:, :start, start:stop] = product[:, start:stop, :start].mT
    return product


def look_ups(layer: Any, inputs: Tensor) -> Tensor:
    """How often each token is looked up, int64 [tokens]."""
    return inputs.flatten().bincount(minlength=layer.num_embeddings)


@contextmanager
def hooked(model: nn.Module, names: Iterable[str], hook: Callable) -> Iterator[None]:
    """Call ``hook(name, layer, inputs, output)`` in forward passes, which autocast leaves alone.

    Not where a layer is told more than its input, such as the size of the output.
    """

    def calling(name: str) -> Callable:
        def called(layer: Any, args: tuple, kwargs: dict, output: Tensor) -> Any:
            if len(args) + len(kwargs) > 1:
                return None
            with full_precision():
                return hook(name, layer, args or (kwargs["input"],), output)

        return called

    handles = [
        model.get_submodule(name).register_forward_hook(calling(name), with_kwargs=True)
        for name in names
    ]
    try:
        with FullPrecision():
            yield
    finally:
        for handle in handles:
            handle.remove()


def watch(
    model: nn.Module, images: Tensor, names: Iterable[str], hook: Callable, batch_size: int = 50
) -> None:
    """Run a model on images, in batches, with a hook as of ``hooked`` on the layers named."""
    with hooked(model, names, hook), torch.no_grad():
        for batch in split(images, batch_size):
            model(own(batch, model))
