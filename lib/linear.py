"""Layers as linear maps: the rows of their weights, and how a forward pass is watched.

Linear, embedding, convolutional and transposed convolutional layers of any stride, padding,
dilation and grouping are handled, where they compute what torch's layers of these types do; so are
the projections inside of ``nn.MultiheadAttention``, in a network that is ``attention.opened``.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .fold import TRANSPOSED
from .inputs import FullPrecision, full_precision, own, owners, split

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding | Transposed
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, *TRANSPOSED)


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
    owned = owners(model)
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, KINDS) and _is_torchs(layer)
        and not (isinstance(layer, nn.Embedding)
                 and (layer.max_norm is not None or owned[id(layer.weight)] > 1))
    }  # fmt: skip


def _is_torchs(layer: Layer) -> bool:
    """Whether it computes what its type says, from its own weight: subclasses need not."""
    kind = next(k for k in KINDS if isinstance(layer, k))
    forward = getattr(layer.forward, "__func__", None)
    inner = getattr(type(layer), "_conv_forward", None) is getattr(kind, "_conv_forward", None)
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return forward is kind.forward and inner and not hooks and "weight" in layer._parameters


def bias_of(layer: Layer) -> Tensor | None:
    """Its bias, if there is one; one that is computed (a parametrization) stays as it is."""
    if isinstance(layer, nn.Embedding) or is_parametrized(layer, "bias"):
        return None
    return layer.bias


@contextmanager
def hooked(model: nn.Module, names: Iterable[str], hook: Callable) -> Iterator[None]:
    """Call ``hook(name, layer, inputs, output)`` in forward passes, which autocast leaves alone.

    Not where a layer is told more than its input, such as the size of the output, and not where
    it reads no sample.
    """

    def calling(name: str) -> Callable:
        def called(layer: Any, args: tuple, kwargs: dict, output: Tensor) -> Any:
            if len(args) + len(kwargs) > 1 or not output.numel():
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
