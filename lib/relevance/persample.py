"""Collectors of what each sample brings by itself: its absolute values, or its squares."""

from collections import Counter, defaultdict

import torch
from torch import Tensor

from .collectors import PerWeight
from .layers import Key, Layer
from .operations import Layout, Piece, find_samples, per_sample


class PerSample(PerWeight):
    """A power of the relevance of each weight in each sample, summed over samples."""

    samplewise = True
    power: int  # 1: absolute values, 2: squares
    stacked = 1  # samples that propagation sees for each image of a batch

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__(weights)
        # by place in the first batch, what each use of a weight reads for some images alone
        self.singles: dict[int, list[tuple[Key | None, Tensor]]] = {}
        self.layouts: dict[int, tuple[Layout | None, bool]] = {}  # by the number of the use
        self.uses: Counter[Key | None] = Counter()
        self.pieces: dict[Key, list[Piece]] = defaultdict(list)
        self.made: dict[Key, Tensor] = {}  # of one image, by what was computed from the weight

    def follow(self, place: int) -> None:
        self.read = self.singles[place] = []

    def begin(self, images: Tensor) -> Tensor:
        self.uses.clear()
        self.pieces.clear()
        self.number, self.unlike = 0, False  # uses in this batch
        return super().begin(images)

    def use(self, layer: Layer, a: Tensor) -> None:
        if not self.samples:
            self.read.append((layer.key, a.detach()))
            return
        number, samples = self.number, self.stacked * self.samples
        self.number += 1
        self.uses[layer.key] += 1
        if samples == 1:
            layer.layout = (0, False)
            return
        if self.stacked > 1:  # the same batch goes through several times
            number %= len(self.read) or 1
        reads = [read[number] for read in self.singles.values() if number < len(read)]
        alike = len(reads) == len(self.singles) and all(key == layer.key for key, _ in reads)
        if alike and number not in self.layouts:
            singles = {place: read[number][1] for place, read in self.singles.items()}
            self.layouts[number] = find_samples(a.detach(), singles, samples, self.copies)
        layer.layout, clear = self.layouts[number] if alike else (None, True)
        # without a layout: read by all images together, such as a table; one that is added to what
        # is their own is looked up once more for each, one that a layer is computed from is not
        alike &= clear and not (layer.stored and layer.layout is None)
        if layer.layout is not None:
            axis, (_, single) = layer.layout[0], reads[0]
            alike &= self.copies * a.shape[axis] == samples * single.shape[axis]
        if not alike and layer.key is not None:
            layer.layout, self.unlike = None, True

    def weight(self, layer: Layer, s: Tensor, a: Tensor, w: Tensor, grad: Tensor | None) -> None:
        s, a = (layer.by_sample(t, self.samples) for t in (s, a))
        if s.numel():  # an expert may read nothing
            self.pieces[layer.place].append((layer.operation, s, a, w))

    def done(self, layer: Layer) -> None:
        """Add up a weight once all its uses have got their relevance, to free what it took."""
        self.uses[layer.key] -= 1
        if not self.uses[layer.key]:
            self._reduce(layer.place)

    @torch.no_grad()
    def end(self) -> None:
        """Add up the weights of which some use got none."""
        for key in {**self.pieces, **self.made}:
            self._reduce(key)

    def _reduce(self, key: Key) -> None:
        pieces, relevance = self.pieces.pop(key, []), self.made.pop(key, None)
        if relevance is not None:
            for operation, s, a, w in pieces:
                _, grad = operation.backward(s, a, w, False, True)
                assert grad is not None
                relevance.addcmul_(w, grad)
            self.total(key).add_(relevance.abs_() if self.power == 1 else relevance.square_())
        elif pieces:
            per_sample(pieces, self.samples, self.power, self.total(key))

    def rows(self, layer: Layer, indices: Tensor, g: Tensor, w: Tensor) -> None:
        indices, g, w = (layer.by_sample(t, self.samples) for t in (indices, g, w))
        total = self.total(layer.place)
        if layer.stored and self.samples == 1:
            made = self.made.setdefault(layer.place, torch.zeros_like(total))
            made.index_add_(0, indices.reshape(-1), (g * w).reshape(-1, *total.shape[1:]))
            return
        size, width = len(total), total[0].numel()
        flat, g, w = indices.reshape(-1), g.reshape(-1, width), w.reshape(-1, width)
        sample = torch.arange(len(flat), device=flat.device) * self.samples // len(flat)
        pairs, where = torch.unique(sample * size + flat, return_inverse=True)
        # relevance of each pair of a sample and a row it looks up: [pairs, width]
        relevance = g.new_zeros(len(pairs), width).index_add_(0, where, g * w)
        relevance = relevance.abs() if self.power == 1 else relevance.square()
        total.index_add_(0, pairs % size, relevance.view(-1, *total.shape[1:]))


class Absolutes(PerSample):
    """Absolute relevance of each weight in each sample, summed over samples."""

    power = 1


class Squares(PerSample):
    """Squared relevance of each weight in each sample, summed over samples."""

    power = 2
