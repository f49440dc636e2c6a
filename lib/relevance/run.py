"""One scoring run: a private copy of the model, batches through it, totals per weight."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lib.models import fold_batchnorm
from lib.relevance.data import (
    AGGREGATES,
    STARTS,
    check_logits,
    check_samples,
    scored_weights,
    start_gradient,
)
from lib.relevance.engine import Propagation
from lib.relevance.layers import (
    Key,
    Layer,
    UnsupportedLayerError,
)
from lib.relevance.operations import Layout, Operation, find_samples, per_sample
from lib.relevance.rules import RuleLike, bounded, chooser


class Run:
    """Propagates relevance batch by batch and collects what arrives at weights and units.

    Parameters
    ----------
    model, images, labels, rule, start, batch_size
        As for ``lib.relevance.weight_relevance``.
    wanted : str
        ``sum``, ``abs`` or ``rms`` of weight relevance, ``input``, ``units``, or ``moments``.
    ordinary : bool
        Carry ordinary gradients instead of relevance; then ``start`` may also be ``loss``, the
        cross-entropy.

    Attributes
    ----------
    totals : dict of str to Tensor
        Weight name -> signed sum, sum of absolute values or of squares over all samples; for
        ``units`` the sum of squared ``R / z`` per unit, for ``moments`` the sum of the squared
        input of each connection, over positions too.
    counts : Counter
        Weight name -> terms in each of the ``units`` sums.
    sums, samplewise : bool
        Whether weights are wanted as a sum over samples, or for each sample.

    Raises
    ------
    UnsupportedLayerError, ValueError
        As for ``weight_relevance``; all of them before anything is propagated.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, labels: Tensor, rule: RuleLike, start: str,
        wanted: str, batch_size: int = 32, ordinary: bool = False,
    ):  # fmt: skip
        if start not in STARTS and not (ordinary and start == "loss"):
            raise ValueError(f"unknown start {start!r}; known: {', '.join(STARTS)}")
        if batch_size < 1:
            raise ValueError("batch_size must be at least 1")
        choose = chooser(rule)
        check_samples(images, labels)
        names = scored_weights(model)
        self.images, self.labels = images, labels.long()
        self.start, self.batch_size = start, batch_size
        self.wanted, self.sums = wanted, wanted == "sum"
        self.samplewise, self.paired = wanted in ("abs", "rms"), False
        private = fold_batchnorm(model)
        self.weights = {name: private.get_parameter(name).detach() for name in names}
        self.device = next(iter(self.weights.values())).device
        keys = {id(private.get_parameter(name)): name for name in names}
        with torch.no_grad():
            plain = private(self._take(images, slice(1)))
        check_logits(plain, labels)
        if start == "contrastive" and plain.shape[1] < 2:
            raise ValueError("a contrastive start needs at least two classes")
        self.totals: dict[str, Tensor] = {}
        if wanted in (*AGGREGATES, "moments"):
            self.totals = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.counts: Counter = Counter()
        self.uses: Counter = Counter()
        self.pieces: dict[Key, list] = defaultdict(list)
        choose = bounded(choose, images)
        self.propagate = Propagation(private, choose, self, keys, ordinary)
        # what each use of a weight reads for the first image, and where in a batch that is
        self.singles: list[Tensor] = []
        self.layouts: list[Layout | None] = []
        with self.collecting(0):
            traced = self.propagate(self._take(images, slice(1)))
        if not torch.allclose(traced, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max())):
            raise UnsupportedLayerError(
                "the traced forward pass differs from the model's: the result of an in-place "
                "operation is not used, or evaluation mode is random; use the returned value"
            )
        for pattern in rule if isinstance(rule, Mapping) else ():
            if not any(fnmatchcase(path, pattern) for path in self.propagate.visited):
                raise ValueError(
                    f"no layer fits {pattern!r}; layers: {', '.join(self.propagate.visited)}"
                )

    def batches(self) -> Iterator[Tensor | None]:
        """Propagate everything; yields each batch's input relevance where that is wanted."""
        for first in range(0, len(self.images), self.batch_size):
            part = slice(first, first + self.batch_size)
            with torch.autocast(self.device.type, enabled=False):
                yield self._batch(self._take(self.images, part), self._take(self.labels, part))

    def _take(self, data: Tensor, part: slice) -> Tensor:
        taken = data[part].to(self.device)
        return taken.clone() if taken.is_inference() else taken

    @contextmanager
    def collecting(self, samples: int) -> Iterator[None]:
        """Take what one forward and backward pass over so many samples brings."""
        self.samples = samples
        self.uses.clear()
        yield
        for key in list(self.pieces):
            self._reduce(key)

    def _batch(self, images: Tensor, labels: Tensor) -> Tensor | None:
        inputs = self.wanted == "input"
        self.image = images.detach().clone().requires_grad_() if inputs else images
        self.shortcut = torch.zeros_like(images) if inputs else None
        with self.collecting(len(images)):
            logits = self.propagate(self.image)
            if self.wanted != "moments":
                logits.backward(start_gradient(logits.detach(), labels, self.start))
        if not inputs:
            return None
        gradient = self.image.grad
        return self.shortcut if gradient is None else self.shortcut + images * gradient

    def use(self, layer: Layer, a: Tensor) -> Layer:
        """Note that a weight is used once more in this forward pass, and on what."""
        if not self.samples:
            self.singles.append(a.detach() if self.samplewise else a.new_empty(0))
            return layer
        number = self.uses.total() % len(self.singles)
        if self.samplewise and number == len(self.layouts):
            self.layouts.append(
                find_samples(a, self.singles[number], self.samples * (1 + self.paired))
            )
        if self.samplewise:
            layer.layout = self.layouts[number]
        self.uses[layer.key] += 1
        if self.wanted == "moments" and layer.key:
            name, first, last = layer.key
            w = self.weights[name][first:last]
            self.totals[name][first:last] += layer.operation.squares(a.detach(), w)
        return layer

    def unit(self, key: Key, g: Tensor, operation: Operation) -> None:
        """Take the ``R / z`` that arrive at a layer's outputs."""
        if self.wanted == "units":
            axis = 1 if operation.options else g.dim() - 1
            squared = g.square().sum([d for d in range(g.dim()) if d != axis])
            self._units(key, squared, g.numel() // len(squared))

    def _units(self, key: Key, squared: Tensor, count: int) -> None:
        name, first, last = key
        if name not in self.totals:
            size = len(squared) if last is None else len(self.weights[name])
            self.totals[name] = squared.new_zeros(size)
        self.totals[name][first:last] += squared
        self.counts[name] += count if not first else 0

    def weight(self, layer: Layer, s, a, w, gradient: Tensor | None) -> None:
        """Take one part of a weight's relevance, ``w ⊙ gradient`` or what it is made of."""
        name, first, last = layer.key
        if self.sums:
            self.totals[name][first:last].addcmul_(w, gradient)
        elif self.samplewise:
            if not self.paired:
                s, a = (layer.by_sample(t, self.samples) for t in (s, a))
            self.pieces[layer.key].append((layer.operation, s, a, w))

    def done(self, key: Key) -> None:
        """Note that one use of the weight has got its relevance."""
        self.uses[key] -= 1
        if not self.uses[key]:
            self._reduce(key)

    def _reduce(self, key: Key) -> None:
        pieces = self.pieces.pop(key, [])
        if pieces:
            name, first, last = key
            power = 1 if self.wanted == "abs" else 2
            per_sample(pieces, self.samples, power, self.totals[name][first:last])

    def rows(self, layer: Layer, indices: Tensor, g: Tensor, w: Tensor) -> None:
        """Take the ``R / z`` of looked-up rows."""
        name = layer.key[0]
        size, width = self.weights[name].shape
        if self.samplewise:
            indices, g, w = (layer.by_sample(t, self.samples) for t in (indices, g, w))
        flat, g, w = indices.reshape(-1), g.reshape(-1, width), w.reshape(-1, width)
        if self.wanted == "units":
            squared = g.new_zeros(size).index_add_(0, flat, g.square().mean(1))
            self._units(layer.key, squared, len(flat))
        elif self.sums:
            self.totals[name].index_add_(0, flat, g * w)
        elif self.samplewise:
            sample = torch.arange(len(flat), device=flat.device) * self.samples // len(flat)
            pairs, where = torch.unique(sample * size + flat, return_inverse=True)
            summed = g.new_zeros(len(pairs), width).index_add_(0, where, g * w)
            summed = summed.abs() if self.wanted == "abs" else summed.square()
            self.totals[name].index_add_(0, pairs % size, summed)

    def direct(self, a: Tensor, relevance: Tensor) -> Tensor | None:
        """Relevance over input where the rule gives relevance itself.

        For the images, relevance is kept as it is, because pixels may be zero.
        """
        image = self.image
        if a.data_ptr() == image.data_ptr() and a.numel() == image.numel() and a.is_contiguous():
            self.shortcut += relevance.reshape(image.shape)
            return None
        return relevance / torch.where(a == 0, torch.inf, a)
