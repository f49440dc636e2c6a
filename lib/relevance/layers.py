"""Layers as autograd functions whose backward pass carries relevance divided by activation."""

from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from ..inputs import UnsupportedLayerError
from .operations import Layout, Operation
from .rules import DIRECT, Rule, terms

Key = tuple[str, int | None, int | None]  # a weight's name and which of its rows


class Collector(Protocol):
    """Whoever adds up relevance, as layers and functions know it: they report, it keeps.

    Subclasses inherit methods that keep nothing.

    Attributes
    ----------
    sums : bool
        Whether ``weight`` needs the weight gradient of a part, summed over the batch.
    samplewise : bool
        Whether ``weight`` needs the parts themselves, and layers their ``layout``.
    """

    sums: bool = False
    samplewise: bool = False

    def use(self, layer: "Layer", a: Tensor) -> None:
        """A forward pass uses a weight once more, on the input ``a``; may set ``layer.layout``."""
        return

    def unit(self, layer: "Layer", g: Tensor) -> None:
        """``R / z`` arrives at the outputs of a scored layer; ``g`` is shaped like them."""
        return

    def weight(self, layer: "Layer", s: Tensor, a: Tensor, w: Tensor, grad: Tensor | None) -> None:
        """One part of a scored weight's relevance: ``w ⊙ grad``, grad that of ``Σ s z(a, w)``.

        ``s`` is shaped like the output, ``a`` like the input, ``w`` like the weight; ``grad`` is
        None unless ``sums``.
        """
        return

    def done(self, layer: "Layer") -> None:
        """All parts of this use of a scored weight are reported."""
        return

    def rows(self, layer: "Layer", indices: Tensor, g: Tensor, w: Tensor) -> None:
        """``R / z`` arrives at looked-up rows: indices [...], ``g`` and ``w`` [..., width]."""
        return

    def pixels(self, a: Tensor, relevance: Tensor) -> bool:
        """Whether the input ``a`` is the images, whose relevance is then kept as it is."""
        return False


@dataclass(eq=False)
class Layer:
    """One use of a weight: what to do with the relevance that arrives there.

    Attributes
    ----------
    operation : Operation
        The linear map.
    rule : Rule
        How it shares relevance.
    collector : Collector
        Told what arrives at units and weights.
    key : Key or None
        None for weights that are not scored.
    layout : Layout or None
        Where the samples are in the input; None where that cannot be told.
    stored : bool
        Whether the weight is only what the one that is used was computed from.
    """

    operation: Operation
    rule: Rule
    collector: Collector
    key: Key | None
    layout: Layout | None = (0, False)
    stored: bool = False

    @property
    def place(self) -> Key:
        """The key of a scored weight."""
        assert self.key is not None
        return self.key

    def by_sample(self, t: Tensor, samples: int) -> Tensor:
        """The same entries, those of one sample next to each other along the first axis."""
        if samples == 1:
            return t
        if self.layout is None:
            raise UnsupportedLayerError(
                f"relevance of {self.place[0]!r} cannot be told apart by sample, since its input "
                "is shared, mixed or not there for each; use aggregate='sum' or batch_size=1, or a "
                "criterion by sums (lrp-epsilon)"
            )
        axis, fastest = self.layout
        t = t.movedim(axis, 0)  # [samples · positions, ...], or positions · samples if fastest
        return t.unflatten(0, (-1, samples)).transpose(0, 1).flatten(0, 1) if fastest else t

    def distribute(
        self, g: Tensor, a: Tensor, w: Tensor, b: Tensor | None, z: Tensor,
        needs_input: bool, needs_weight: bool,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Turn ``R / z`` of the outputs into ``R / a`` of the inputs; report to the collector.

        The second is ``R / w``, for a weight that was computed from stored ones.
        """
        scored, collector = self.key is not None, self.collector
        sums = (scored and collector.sums) or needs_weight
        if scored:
            collector.unit(self, g)
        if not (needs_input or sums or (scored and collector.samplewise)):
            return None, None
        to_weight = torch.zeros_like(w) if needs_weight else None  # relevance, like w
        gradient: Tensor | None = None  # like a
        relevance: Tensor | None = None  # like a
        for s, parts in terms(self.rule, self.operation, g, a, w, b, z):
            grads: list[Tensor] = []  # like a
            for a_part, w_part in parts:
                into, grad = self.operation.backward(s, a_part, w_part, needs_input, sums)
                if scored:
                    collector.weight(self, s, a_part, w_part, grad)
                if to_weight is not None and grad is not None:
                    to_weight.addcmul_(w_part, grad)
                if into is not None:
                    grads.append(into)
            if grads and self.rule.name in DIRECT:
                shares = (part * into for (part, _), into in zip(parts, grads, strict=True))
                relevance = reduce(torch.add, shares)
            elif grads:
                into = grads[0] if len(grads) == 1 else torch.where(a >= 0, grads[0], grads[1])
                gradient = into if gradient is None else gradient.add_(into)
        if scored:
            collector.done(self)
        if to_weight is not None:
            to_weight.div_(torch.where(w == 0, torch.inf, w))
        if relevance is None:
            return gradient, to_weight
        if collector.pixels(a, relevance):
            return None, to_weight
        return relevance / torch.where(a == 0, torch.inf, a), to_weight


class Propagate(torch.autograd.Function):
    """A linear layer whose backward pass carries relevance divided by activation."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, anchor: Tensor, w: Tensor, b: Tensor | None, layer: Layer
    ) -> Tensor:
        """Ordinary output; ``anchor`` only makes autograd record the call."""
        z = layer.operation(a, w, b)
        ctx.layer = layer
        if not ctx.needs_input_grad[0]:  # memory of the forward's own, which it may use again
            a = a.clone()
        ctx.save_for_backward(a, w, b, None if layer.rule.is_gradient(z.dtype) else z)
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        """Modified gradients of the input, and of a weight that was computed."""
        a, w, b, z = ctx.saved_tensors
        needs_input, _, needs_weight, *_ = ctx.needs_input_grad
        into, weight = ctx.layer.distribute(g, a, w, b, z, needs_input, needs_weight)
        return into, None, weight, None, None


class Activate(torch.autograd.Function):
    """An elementwise nonlinearity that relevance passes unchanged (Bach et al. 2015)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor) -> Tensor:
        """The activation computed elsewhere; what reads it may keep it as well, in one memory."""
        ctx.save_for_backward(x, out)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        """``R / x = g out / x``, 0 where the input is 0; conjugate, as autograd's gradients are."""
        x, out = ctx.saved_tensors
        return torch.mul(g, out.conj()).div_(torch.where(x == 0, torch.inf, x).conj()), None


class Embed(torch.autograd.Function):
    """A row lookup: relevance of an entry is what arrives at it."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, anchor: Tensor, w: Tensor, layer: Layer) -> Tensor:
        """Rows of the weight [..., width]."""
        ctx.layer = layer
        ctx.save_for_backward(indices, w)
        return w[indices]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, None, None]:
        """Report to the collector; indices have no relevance of their own here."""
        indices, w = ctx.saved_tensors
        if ctx.layer.key is not None:
            ctx.layer.collector.rows(ctx.layer, indices, g, w[indices])
        return None, None, None, None
