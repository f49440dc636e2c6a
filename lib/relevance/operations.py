"""Maps linear in input and weight: gradients, and weight relevance sample by sample."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

Layout = tuple[int, bool]  # axis of the samples; whether they vary fastest in it
Piece = tuple["Operation", Tensor, Tensor, Tensor]  # one contribution: operation, s, a, w
DEPTH = 8  # samples whose weight relevance is formed at a time
TILE = 1 << 20  # floats of it held at a time: what caches hold
NEAR, ROUNDING = 1e-3, 1e-6  # of the largest entry: what a sample may differ by; always does


@dataclass(frozen=True)
class Operation:
    """A dense layer (``options`` empty) or a convolution with torch's options of one.

    Attributes
    ----------
    options : tuple
        ``(stride, padding, dilation, transposed, output_padding, groups)``.
    after : tuple of int
        Zeros behind the input along each spatial axis, besides the padding of both sides.
    """

    options: tuple = ()
    after: tuple[int, ...] = ()

    def __call__(self, a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        if not self.options:
            return F.linear(a, w, b)
        return torch.convolution(self._padded(a), w, b, *self.options)

    def _padded(self, a: Tensor) -> Tensor:
        """The input with the zeros behind it."""
        pads = [p for zeros in reversed(self.after) for p in (0, zeros)]
        return F.pad(a, pads) if any(pads) else a

    def backward(
        self, s: Tensor, a: Tensor, w: Tensor, needs_input: bool, needs_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of ``Σ s z`` for input and weight, None where not needed."""
        if self.options:
            mask = [needs_input, needs_weight, False]
            backward = torch.ops.aten.convolution_backward
            into, grad, _ = backward(s, self._padded(a), w, None, *self.options, mask)
            if into is not None and into.shape != a.shape:
                into = into[tuple(slice(n) for n in a.shape)]
            return into, grad
        return (
            s @ w if needs_input else None,  # [..., inputs]
            s.flatten(0, -2).mT @ a.flatten(0, -2) if needs_weight else None,  # [outputs, inputs]
        )

    def squares(self, a: Tensor, w: Tensor) -> Tensor:
        """Sum of the squared input of each connection, shaped to broadcast with the weight."""
        if not a.is_floating_point():  # rows of an embedding read a one
            return torch.bincount(a.flatten(), minlength=len(w))[:, None]  # [rows, 1]
        if not self.options:
            return a.square().flatten(0, -2).sum(0)  # [inputs]
        if self.options[3]:
            return a.square().transpose(0, 1).flatten(1).sum(1).view(-1, *[1] * (w.dim() - 1))
        a = self._padded(a)
        one = w[:: len(w) // self.options[-1]]  # one filter of each group: [groups, ...]
        positions = torch.convolution(a.to("meta"), one.to("meta"), None, *self.options)
        ones = torch.ones_like(positions, device=a.device)
        _, sums = replace(self, after=()).backward(ones, a.square(), one, False, True)
        assert sums is not None
        return sums.repeat_interleave(len(w) // len(one), 0)

    def columns(self, s: Tensor, a: Tensor, kernel: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Matrices whose product is the weight gradient of one sample.

        Parameters
        ----------
        s, a : Tensor
            Output gradient and input, samples first.
        kernel : tuple of int
            Spatial shape of the weight.

        Returns
        -------
        Tensor [samples, groups, rows, positions], Tensor [samples, groups, positions, columns]
        """
        if not self.options:
            s, a = (t.reshape(len(t), 1, -1, t.shape[-1]) for t in (s, a))
            return s.mT, a
        stride, padding, dilation, transposed, _, groups = self.options
        if transposed:
            s, a = a, s
        patches = F.pad(self._padded(a), [p for side in reversed(padding) for p in (side, side)])
        for axis, (k, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
            patches = patches.unfold(axis, gap * (k - 1) + 1, step)[..., ::gap]
            patches = patches.narrow(axis, 0, s.shape[axis])
        n, dims = len(a), len(kernel)
        # [samples, groups, channels / groups, places..., taps...]
        patches = patches.unflatten(1, (groups, -1))
        places, taps = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
        patches = patches.permute(0, 1, 2, *taps, *places).reshape(
            n, groups, -1, math.prod(s.shape[2:])
        )
        return s.reshape(n, groups, -1, patches.shape[-1]), patches.mT


def per_sample(pieces: list[Piece], samples: int, power: int, total: Tensor) -> None:
    """Add ``Σ_n |R_n|^power`` of one batch to a total, without a loop over samples.

    Parameters
    ----------
    pieces : list of (Operation, s, a, w)
        All contributions to the weight's relevance: sample n's is
        ``R_n = Σ_pieces w ⊙ weight gradient(s_n, a_n)``.
    samples : int
        Images in the batch. Rows beyond that (tokens or frames folded into the first axis) are
        taken as positions of the image they follow.
    power : {1, 2}
        1 sums absolute values, 2 squares.
    total : Tensor
        Shaped like the weight; changed in place.
    """
    weigh = torch.abs if power == 1 else torch.square
    operation, s, a, w = pieces[0]
    single = len(pieces) == 1
    if single and s.dim() == 2 and len(s) == samples:
        # |s_nk a_nj w_kj| is a product of three, so one matrix product sums it over samples
        total.addcmul_(weigh(s).mT @ weigh(a), weigh(w))  # [outputs, inputs]
        return
    summed = torch.zeros_like(total, memory_format=torch.contiguous_format)
    for first in range(0, samples, DEPTH):
        last = min(first + DEPTH, samples)
        matrices = [_matrices(*piece, samples, first, last) for piece in pieces]
        groups, rows, width = matrices[0][2].shape
        out = summed.view(groups, rows, width)  # the weight as matrices
        height = max(1, TILE // (groups * width * DEPTH))
        for row in range(0, rows, height):
            band = slice(row, row + height)
            products = (left[:, :, band] @ right for left, right, _ in matrices)
            if not single:
                weights = (w_rows[:, band] for _, _, w_rows in matrices)
                products = (p.mul_(w_band) for p, w_band in zip(products, weights, strict=True))
            tile = reduce(Tensor.add_, products)  # [DEPTH, groups, height, width]
            out[:, band] += (tile.abs_() if power == 1 else tile.square_()).sum(0)
    total += summed.mul_(weigh(w)) if single else summed


def _matrices(
    operation: Operation, s: Tensor, a: Tensor, w: Tensor, samples: int, first: int, last: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``Operation.columns`` of some samples, positions of one sample side by side; the weight."""
    s, a = (t[first * len(t) // samples : last * len(t) // samples] for t in (s, a))
    left, right = operation.columns(s, a, tuple(w.shape[2:]))
    if len(s) != last - first:  # several rows a sample: they join its positions
        left = left.unflatten(0, (last - first, -1)).permute(0, 2, 3, 1, 4).flatten(3)
        right = right.unflatten(0, (last - first, -1)).transpose(1, 2).flatten(2, 3)
    return left, right, w.reshape(left.shape[1], left.shape[2], -1)


def find_samples(
    batch: Tensor, singles: Mapping[int, Tensor], samples: int, copies: int = 1
) -> tuple[Layout | None, bool]:
    """Find the samples in a layer's input.

    Parameters
    ----------
    batch : Tensor
        What the layer reads for a batch of so many samples.
    singles : mapping of int to Tensor
        What it reads for some of them alone, or for so many copies of it, by their place in the
        batch; all of one shape.

    Returns
    -------
    Layout or None
        None if the batch does not contain these samples by themselves along one axis.
    bool
        Whether it contains them in one way alone, or in none.
    """
    if samples == 1:
        return (0, False), True
    shape = next(iter(singles.values())).shape
    if not batch.numel() or not shape.numel():
        return None, True
    sizes = enumerate(zip(batch.shape, shape, strict=False))
    axis = next((d for d, (size, one) in sizes if copies * size == samples * one), None)
    if axis is None or shape[axis] % copies:
        return None, True
    nothing = batch.is_floating_point() and not batch.any()
    ways = {
        fastest: _distance(batch, singles, axis, samples, copies, fastest)
        for fastest in ((False,) if shape[axis] == copies or nothing else (False, True))
    }
    best = min(ways, key=lambda fastest: ways[fastest])
    clear = all(far > 10 * ways[best] + ROUNDING for way, far in ways.items() if way != best)
    return ((axis, best), clear) if ways[best] < NEAR else (None, True)


def _distance(
    batch: Tensor, singles: Mapping[int, Tensor], axis: int, samples: int, copies: int,
    fastest: bool,
) -> float:  # fmt: skip
    """Largest difference between samples in a batch and by themselves, of the largest entry."""
    parts = _parts(batch, axis, samples, fastest)
    far = 0.0
    for place, single in singles.items():
        scale = float(single.abs().max()) or 1.0
        for other in _parts(single, axis, copies, fastest):
            if other.shape != parts[place].shape:
                return math.inf
            if single.is_floating_point():
                gap = float((parts[place] - other).abs().max()) / scale
                far = max(far, gap) if gap == gap else math.inf
            elif not torch.equal(parts[place], other):  # indices
                return math.inf
    return far


def _parts(t: Tensor, axis: int, count: int, fastest: bool) -> tuple[Tensor, ...]:
    """The entries of each of so many samples along an axis."""
    if fastest:
        return t.unflatten(axis, (-1, count)).unbind(axis + 1)
    return t.unflatten(axis, (count, -1)).unbind(axis)
