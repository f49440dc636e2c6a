"""Layers as autograd functions whose backward pass carries relevance divided by activation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lib.relevance.operations import Layout, Operation
from lib.relevance.rules import DIRECT, Rule, terms

Key = tuple[str, int | None, int | None]  # a weight's name and which of its rows


class UnsupportedLayerError(NotImplementedError):
    """A layer or function through which relevance has no defined way."""


@dataclass
class Layer:
    """One use of a weight: what to do with the relevance that arrives there.

    Attributes
    ----------
    operation : Operation
        The linear map.
    rule : Rule
        How it shares relevance.
    sink : lib.relevance.run.Run
        Told what arrives at units and weights.
    key : Key or None
        None for weights that are not scored.
    layout : Layout or None
        Where the samples are in the input; None where that cannot be told.
    """

    operation: Operation
    rule: Rule
    sink: object
    key: Key | None
    layout: Layout | None = (0, False)

    def by_sample(self, t: Tensor, samples: int) -> Tensor:
        """The same entries, those of one sample next to each other along the first axis."""
        if samples == 1:
            return t
        if self.layout is None:
            raise UnsupportedLayerError(
                f"relevance of {self.key[0]!r} cannot be told apart by sample, since its input is "
                "shared or mixed; use aggregate='sum' or batch_size=1"
            )
        axis, fastest = self.layout
        t = t.movedim(axis, 0)
        return t.unflatten(0, (-1, samples)).transpose(0, 1).flatten(0, 1) if fastest else t

    def distribute(self, g, a, w, b, z, needs_input: bool) -> Tensor | None:
        """Turn ``R / z`` of the outputs into ``R / a`` of the inputs; report to the sink."""
        scored = self.key is not None
        sums = scored and self.sink.sums
        if scored:
            self.sink.unit(self.key, g, self.operation)
        if not (needs_input or sums or (scored and self.sink.samplewise)):
            return None
        if self.sink.paired:
            return self._distribute_pairs(g, a, w, needs_input, sums)
        gradient = relevance = None
        for s, parts in terms(self.rule, self.operation, g, a, w, b, z):
            grads = []
            for a_part, w_part in parts:
                into, weight = self.operation.backward(s, a_part, w_part, needs_input, sums)
                if scored:
                    self.sink.weight(self, s, a_part, w_part, weight)
                grads.append(into)
            if not needs_input:
                continue
            if self.rule.name in DIRECT:
                relevance = sum(part * into for (part, _), into in zip(parts, grads, strict=True))
                continue
            into = grads[0] if len(grads) == 1 else torch.where(a >= 0, *grads)
            gradient = into if gradient is None else gradient.add_(into)
        if scored:
            self.sink.done(self.key)
        return gradient if relevance is None else self.sink.direct(a, relevance)

    def _distribute_pairs(self, g, a, w, needs_input: bool, sums: bool) -> Tensor | None:
        """The same where the second half of a batch is the reference of the first (DeepLIFT)."""
        into, _ = self.operation.backward(g, a, w, needs_input, False)
        if self.key is not None:
            s, pairs = (self.by_sample(t, 2 * self.sink.samples) for t in (g, a))
            half = len(s) // 2
            s, difference = s[:half], pairs[:half] - pairs[half:]
            _, weight = self.operation.backward(s, difference, w, False, sums)
            self.sink.weight(self, s, difference, w, weight)
            self.sink.done(self.key)
        return into


class Propagate(torch.autograd.Function):
    """A linear layer whose backward pass carries relevance divided by activation."""

    @staticmethod
    def forward(ctx, a, anchor, w, b, layer):
        """Ordinary output; ``anchor`` only makes autograd record the call."""
        z = layer.operation(a, w, b)
        ctx.layer = layer
        ctx.save_for_backward(a, w, b, None if layer.rule.is_gradient(z.dtype) else z)
        return z

    @staticmethod
    def backward(ctx, g):
        """Modified gradient of the input."""
        a, w, b, z = ctx.saved_tensors
        into = ctx.layer.distribute(g, a, w, b, z, ctx.needs_input_grad[0])
        return into, None, None, None, None


class Activate(torch.autograd.Function):
    """An elementwise nonlinearity that relevance passes unchanged (Bach et al. 2015)."""

    @staticmethod
    def forward(ctx, x, out):
        """The activation computed elsewhere."""
        ctx.save_for_backward(x, out)
        return out.clone()

    @staticmethod
    def backward(ctx, g):
        """``R / x = g out / x``, 0 where the input is 0."""
        x, out = ctx.saved_tensors
        return torch.mul(g, out).div_(torch.where(x == 0, torch.inf, x)), None


class Embed(torch.autograd.Function):
    """A row lookup: relevance of an entry is what arrives at it."""

    @staticmethod
    def forward(ctx, indices, anchor, w, layer):
        """Rows of the weight."""
        ctx.layer = layer
        ctx.save_for_backward(indices, w)
        return w[indices]

    @staticmethod
    def backward(ctx, g):
        """Report to the sink; indices have no relevance of their own here."""
        indices, w = ctx.saved_tensors
        ctx.layer.sink.rows(ctx.layer, indices, g, w[indices])
        return None, None, None, None
