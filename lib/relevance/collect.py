"""Scoring runs: a private copy of the model, and batches of samples through it."""

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..checks import (
    check_alone,
    check_copy,
    check_finite,
    check_logits,
    check_model,
    check_samples,
)
from ..fold import fold
from ..inputs import (
    Output,
    UnsupportedLayerError,
    batched,
    copied,
    full_precision,
    names_by_memory,
    own,
    probed,
    unwrapped,
)  # fmt: skip
from .collectors import Collected, InputMoments, PerWeight, Sums
from .moving import moving_of, steps_of
from .persample import Absolutes, Squares
from .rules import DIRECT, RuleLike, bounded, chooser
from .samples import STARTS, scored_weights, start_gradient
from .saved import Saved
from .trace import Propagation

WANTED: dict[str, type[PerWeight]] = {
    "sum": Sums, "abs": Absolutes, "rms": Squares, "squares": Squares,
    "moments": InputMoments,
}  # fmt: skip
C = TypeVar("C", bound=Collected)


class Run(Generic[C]):
    """A private copy of the model, and all samples through it.

    Parameters
    ----------
    collector : callable
        Makes the collector from the scored weights: a subclass of ``Collected``.
    model, images, labels, rule, start, batch_size, output
        As for ``lib.relevance.weight_relevance``.
    ordinary : bool
        Carry ordinary gradients instead of relevance; then ``start`` may also be ``loss``, the
        cross-entropy.

    Raises
    ------
    UnsupportedLayerError, ValueError
        As for ``weight_relevance``; all of them before anything is propagated.
    """

    def __init__(
        self, collector: Callable[[dict[str, Tensor]], C], model: nn.Module, images: Tensor,
        labels: Tensor, rule: RuleLike = "epsilon", start: str = "target", batch_size: int = 32,
        output: Output | None = None, *, ordinary: bool = False,
    ):  # fmt: skip
        check_model(model)
        model = unwrapped(model)
        if start not in STARTS and not (ordinary and start == "loss"):
            raise ValueError(f"unknown start {start!r}; known: {', '.join(STARTS)}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, not {batch_size}")
        choose = chooser(rule)
        check_samples(images, labels)
        choose = bounded(choose, images)
        scored_weights(model)  # or there is nothing to do
        self.images, self.labels = images, labels.long()
        self.start, self.batch_size = start, batch_size
        self.constant = False  # whether images are no factors, whatever they are multiplied by
        self.apart = False  # whether what images hold keeps them apart
        self.folded = fold(model if output is None else copied(model, output), images)
        private = self.folded.network
        for module in private.modules():  # they watch gradients, which relevance is not
            module._backward_hooks.clear()
            module._backward_pre_hooks.clear()
        scored = scored_weights(private)
        weights = {name: weight.detach() for name, weight in scored.items()}
        self.device = next(iter(weights.values())).device
        keys = {id(weight): name for name, weight in scored.items()}
        self.collector = collector(weights)
        check_copy(model, private, images[:2])
        image, plain = self._first(private)
        moving = moving_of(private, scored, image)
        self.propagate = Propagation(private, choose, self.collector, keys, ordinary)
        self._follow(image, plain, rule, moving)
        first = choose(next(iter(self.propagate.visited), ""), False, True)
        if first.name in DIRECT and not self.propagate.readers:
            raise UnsupportedLayerError(
                f"rule {first.name!r} is for the layer that reads the images, and none is seen to: "
                "make what it reads of them by torch's functions, or choose another rule"
            )

    def _first(self, private: nn.Module) -> tuple[Tensor, Tensor]:
        """The image that is followed, and the logits, checked."""
        image = self.images[:1]
        plain = probed(private, image)
        if isinstance(plain, Tensor) and plain.dim() < 2 <= len(self.images):
            # A squeeze: followed on two copies, of which the collector knows.
            image, self.collector.copies = torch.cat([image, image]), 2
            self.batch_size = max(2, self.batch_size)
            plain = probed(private, image)
        check_logits(plain, self.labels)
        if self.start == "contrastive" and plain.shape[1] < 2:
            raise ValueError("a contrastive start needs at least two classes")
        check_alone(private, self.images)
        return image, plain

    def _follow(self, image: Tensor, plain: Tensor, rule: RuleLike, moving: set[str]) -> None:
        """Follow one image to learn which layers it uses."""
        network = self.propagate.model
        self.collector.follow(0)
        with (saved := Saved()):
            traced = self.propagate(own(image, network))
        saved.check(names_by_memory(network))
        if self.propagate.shares and image.is_floating_point():
            self.collector.follow(0)
            try:
                traced = self.propagate(own(image, network).requires_grad_())
                self.collector.shares = True
            except UnsupportedLayerError:  # what is made of the images first has no rule: constants
                self.constant = True
                self.collector.follow(0)
                traced = self.propagate(own(image, network))
        if not torch.allclose(traced, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max())):
            raise UnsupportedLayerError(
                "the traced forward pass differs from the model's: evaluation mode is random, or "
                "a tensor is changed in place where torch's functions do not see it"
            )
        made, steps = self.propagate.made, steps_of([traced, *self.propagate.held])
        if unseen := sorted(moving - {made[step] for step in steps if step in made}):
            raise UnsupportedLayerError(
                f"the weight {unseen[0]!r} moves the outputs where no function of torch shows it, "
                "so that it would have no relevance: replace compiled code, autograd functions of "
                "your own and reentrant checkpoints by torch's functions"
            )
        layers = self.propagate.visited
        self.collector.direct = any(rule.name in DIRECT for rule in layers.values())
        own_paths = {name.rpartition(".")[0] for name in self.collector.weights}
        for pattern in rule if isinstance(rule, Mapping) else ():
            if not any(fnmatchcase(path, pattern) for path in {*layers, *own_paths}):
                raise ValueError(f"no layer fits {pattern!r}; layers: {', '.join(layers)}")

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [batch, ...] and labels [batch], on the model's device."""
        network = self.propagate.model
        for part in self._parts():
            yield own(self.images[part], network), own(self.labels[part], network)

    def _parts(self) -> Iterator[slice]:
        """Which images make up each batch, once samples can be told apart."""
        self._tell_apart()
        yield from batched(len(self.images), self.batch_size)

    def _tell_apart(self) -> None:
        """Follow one image more, where samples lie in what layers read is to be told."""
        count = min(self.batch_size, len(self.images))
        if not self.collector.samplewise or count == 1:
            return
        middle = count // 2  # in no order of its entries it stands where it does in the other
        image = torch.cat([self.images[middle : middle + 1]] * self.collector.copies)
        self.collector.follow(middle)
        self.propagate(own(image, self.propagate.model).requires_grad_(self.collector.shares))

    def collect(self) -> C:
        """Propagate everything; gives the collector."""
        with full_precision():
            for part in self._parts():
                self._propagate(part)
        return self.collector

    def _propagate(self, part: slice) -> None:
        """Some images at once, or one by one where what they hold keeps them apart."""
        several = self.collector.samplewise and part.stop - part.start > 1
        logits = None if several and self.apart else self._logits(part)
        self.apart |= several and (self.propagate.counts or self.collector.unlike)
        if several and self.apart:
            del logits  # and with it the graph of the whole batch
            if self.collector.copies > 1:
                raise UnsupportedLayerError(
                    "which rows belong to which image cannot be told: how many are read depends on "
                    "what images hold, or these are alike; use aggregate='sum', or a criterion by "
                    "sums (lrp-epsilon)"
                )
            for place in range(part.start, part.stop):
                self._propagate(slice(place, place + 1))
            return
        assert logits is not None
        if self.collector.backwards:  # a sum: for gradients given, torch imports sympy
            labels = self.labels[part].to(logits.device)
            (logits * start_gradient(logits.detach(), labels, self.start)).sum().backward()
        self.collector.end()

    def _logits(self, part: slice) -> Tensor:
        """Logits [batch, classes] of some images, which take their share where they are factors."""
        images = self.collector.begin(own(self.images[part], self.propagate.model))
        logits = self.propagate(images.requires_grad_() if self.collector.shares else images)
        check_finite(logits)
        late = self.propagate.shares and not self.collector.shares  # unlike those followed before
        possible = self.collector.backwards and images.is_floating_point() and not self.constant
        if not late or not possible:
            return logits
        try:
            self.collector.shares = True
            return self._logits(part)
        except UnsupportedLayerError:
            self.collector.shares, self.constant = False, True
            return self._logits(part)


@torch.inference_mode(False)
@torch.enable_grad()
def totals(
    model: nn.Module, images: Tensor, labels: Tensor, *, wanted: str = "sum", **how: Any
) -> dict[str, Tensor]:
    """What reference samples bring to every weight, added up over them.

    Parameters
    ----------
    model, images, labels, how
        As for ``Run``.
    wanted : {"sum", "abs", "rms", "squares", "moments"}
        Relevance summed; its absolute values summed; the root of its mean square; its squares
        summed; or, without any relevance, the squared input of each connection summed over samples
        and positions.

    Returns
    -------
    dict of str to Tensor
        Weight name -> total, shaped, typed and placed like the weight; squares of what is in half
        precision in float32.

    Raises
    ------
    UnsupportedLayerError, ValueError
        As for ``weight_relevance``; also ValueError for an unknown ``wanted``, and for totals
        beyond the range of their dtype.
    """
    if wanted not in WANTED:
        raise ValueError(f"unknown total {wanted!r}; known: {', '.join(WANTED)}")
    run = Run(WANTED[wanted], model, images, labels, **how)
    weights = dict(unwrapped(model).named_parameters())
    found = run.folded.stored(run.collect().found())
    for name, total in found.items():
        if not total.isfinite().all():
            raise ValueError(
                f"scores of {name!r} leave the range of {str(total.dtype).removeprefix('torch.')}: "
                "give images in units in which activations are of about order one, or the model "
                "and the images in float64"
            )
    if wanted == "rms":
        found = {name: (total / len(images)).sqrt_() for name, total in found.items()}
    if wanted == "squares":
        return found
    # In half precision everything is computed in float32.
    return {name: total.to(weights[name].dtype) for name, total in found.items()}
