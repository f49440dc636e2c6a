"""Least squares for the kept weights of all units of a layer at once."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import View, bias_of
from .moments import borrowed, second_moment
from .patches import batched, look_ups, patches_of, portion, squared, units_of

LARGE = 200  # inputs from which float32 is enough, and conjugate gradients stop early


class Equations:
    """Normal equations of one layer: what it reads, and what its outputs miss.

    A unit has D = d + 1 inputs, the last of them a one for the bias. With ``centre`` the mean of
    the first images' patches is subtracted from all, so that inputs that hardly vary leave no
    rounding of either sign. A bias that is computed stays as it is, and so does any other where
    ``bias`` is False.
    """

    def __init__(self, layer: Any, centre: bool = False, bias: bool = True):
        self.view = View.of(layer)
        groups, rows, width = self.view.rows(layer.weight).shape
        width += 1
        zeros = partial(torch.zeros, dtype=torch.float64, device=layer.weight.device)
        self.layer, self.centre = layer, centre
        self.bias = bias_of(layer) if bias else None
        self.gram = zeros(groups, width, width)  # summed over images and positions
        self.missing = zeros(groups, rows, width)  # (wanted - output) times the patches
        self.shift = layer.weight.new_zeros(groups, width - 1, 1)  # what was subtracted

    def add(self, inputs: Tensor, missing: Tensor, batch_size: int = 50) -> None:
        """See more images: the layer's inputs, and what is missing in its outputs.

        Summing what is missing, not what is wanted, leaves nothing large to cancel.
        """
        inputs, missing = batched(self.layer, inputs), batched(self.layer, missing)
        size = min(batch_size, portion(self.layer, inputs))
        for some, few in zip(inputs.split(size), missing.split(size), strict=True):
            patches = patches_of(self.layer, some, few=True)  # [groups, D, p]
            if self.centre and not self.count.any():
                self.shift = patches[:, :-1].mean(2, keepdim=True) / patches[:, -1:, :1]
            if self.centre:
                patches[:, :-1] -= self.shift * patches[:, -1:, :1]
            self.gram += squared(patches)
            self.missing += units_of(self.layer, few, few=True) @ patches.mT

    def refit(self, mask: Tensor, ridge: float) -> None:
        """Solve for the layer's kept weights (mask: True) and its bias, in place.

        The ridge, positive and relative to the mean diagonal, ties weights to the present ones.
        """
        layer, gram, missing = self.layer, self.gram.clone(), self.missing
        columns = missing.shape[2]
        kept = self.view.rows(mask.to(gram.device))
        if self.bias is None:
            gram, missing = gram[:, :-1, :-1], missing[..., :-1]
        else:
            kept = F.pad(kept, (0, 1), value=True)
        inputs = columns - 1
        scale = gram.diagonal(dim1=1, dim2=2)[:, :inputs].mean(1, keepdim=True)
        gram.diagonal(dim1=1, dim2=2)[:, :inputs] += torch.where(scale > 0, ridge * scale, 1)
        solutions = zip(gram, kept, missing * kept, strict=True)
        change = torch.stack([_solve(*problem) for problem in solutions])  # [groups, rows, D]
        weight = self.view.weight(change[..., :inputs], layer.weight.shape)
        layer.weight.data += weight.to(layer.weight.dtype)
        if self.bias is not None:
            moved = (change[..., :inputs] @ self.shift.double()).squeeze(2)  # by the weights
            self.bias.data += (change[..., -1] - moved).flatten().to(self.bias.dtype)

    def plain(self) -> Tensor:
        """Second moment of the patches as they are, without the shift, like ``gram``."""
        shift = F.pad(self.shift.double(), (0, 0, 0, 1))  # [groups, D, 1]
        moved = shift @ self.gram[:, :, -1:].mT
        return self.gram + moved + moved.mT + self.count[..., None] * shift @ shift.mT

    def moment(self, images: int) -> Tensor:
        """Second moment of the inputs, float64 [groups, d, d]; the covariance if a bias moves.

        ``images`` is how many were seen, which no axis of the inputs need tell: a layer may read
        their tokens as samples, or put time first. See ``moments.second_moment``.
        """
        if self.bias is None:
            return second_moment(self.gram, images)
        share = borrowed(*self.energies(), images)
        return second_moment(self.gram, images, share, self.plain() if share else self.gram)

    def energies(self) -> tuple[float, float]:
        """As of ``moments.energies``, for the patches as they are."""
        sums, shift = self.gram[:, :-1, -1], self.shift.squeeze(2).double()
        total = sums + self.count * shift
        squares = self.gram.diagonal(dim1=1, dim2=2)[:, :-1] + (sums + total) * shift
        return float(squares.sum()), float((total.square() / self.count).sum())

    def outputs(self) -> Tensor:
        """Sum of each unit's outputs by the weights and bias of now, float64 [groups, rows]."""
        weight = self.view.rows(self.layer.weight.detach().double())
        sums = self.gram[:, :-1, -1:] + self.shift.double() * self.gram[:, -1:, -1:]
        total = (weight @ sums).squeeze(2)
        if self.bias is None:
            return total
        return total + self.bias.detach().double().reshape(len(weight), -1) * self.count

    @property
    def count(self) -> Tensor:
        """Images times positions, float64 [groups, 1]."""
        return self.gram[:, -1:, -1]


class LookUps(Equations):
    """The same for an embedding: each row has its own equation, its mean over the look-ups."""

    def add(self, inputs: Tensor, missing: Tensor, batch_size: int = 50) -> None:
        """See ``Equations.add``."""
        counts = look_ups(self.layer, inputs).double()
        self.gram[:, 0, 0] += counts
        self.missing[..., 0].index_add_(0, inputs.flatten(), missing.double().flatten(0, -2))

    def refit(self, mask: Tensor, ridge: float) -> None:
        """See ``Equations.refit``; the mean diagonal is that of all rows."""
        counts = self.gram[:, 0, 0]
        change = self.missing[..., 0] / (counts + ridge * counts.mean())[:, None]
        self.layer.weight.data += (change * mask.to(change.device)).to(self.layer.weight.dtype)

    def moment(self, images: int) -> Tensor:
        """See ``moments.input_moments`` for tokens that were never looked up."""
        counts = self.gram[:, :1, :1] / images
        return torch.where(counts > 0, counts, counts.mean())


def equations(layer: Any, centre: bool = False, bias: bool = True) -> Equations:
    """Those of a layer of any kind."""
    return (LookUps if isinstance(layer, nn.Embedding) else Equations)(layer, centre, bias)


def _solve(gram: Tensor, kept: Tensor, residual: Tensor) -> Tensor:
    """Changes [rows, D] of kept weights for which the masked residual [rows, D] vanishes."""
    change = torch.zeros_like(residual)
    if kept.all():
        return _by_cholesky(gram, residual)
    if (kept == kept[0]).all():
        inputs = kept[0].nonzero().squeeze(1)
        change[:, inputs] = _by_cholesky(gram[inputs[:, None], inputs], residual[:, inputs])
        return change
    if len(gram) > LARGE:
        return _conjugate_gradients(gram.float(), kept, residual.float(), 40, 3e-3).double()
    return _conjugate_gradients(gram, kept, residual, 300)


def _by_cholesky(gram: Tensor, residual: Tensor) -> Tensor:
    """Changes [rows, D] of weights that are all kept."""
    if len(gram) > LARGE:  # misses less than 1e-7 of what the refit gains
        factor, failed = torch.linalg.cholesky_ex(gram.float())
        if not failed:
            return torch.cholesky_solve(residual.mT.float(), factor).mT.double()
    return torch.cholesky_solve(residual.mT, torch.linalg.cholesky(gram)).mT


def _conjugate_gradients(
    gram: Tensor, kept: Tensor, residual: Tensor, iterations: int, tolerance: float = 1e-5
) -> Tensor:
    """The same by conjugate gradients, preconditioned by the diagonal, all rows at once."""
    scale, change, tiny = gram.diagonal().rsqrt(), torch.zeros_like(residual), 1e-30
    gram, residual = gram * scale * scale[:, None], residual * scale
    direction, energy = residual, residual.square().sum(1, keepdim=True)
    enough = energy * tolerance**2
    for _ in range(iterations):
        image = direction @ gram * kept
        step = energy / (direction * image).sum(1, keepdim=True).clamp(min=tiny)
        change, residual = change + step * direction, residual - step * image
        before, energy = energy, residual.square().sum(1, keepdim=True)
        if (energy <= enough).all():
            break
        direction = residual + energy / before.clamp(min=tiny) * direction
    return change * scale
