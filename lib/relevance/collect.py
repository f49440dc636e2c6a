"""Scoring runs: a private copy of the model, and batches of samples through it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..checks import check_alone, check_copy, check_logits, check_model, check_samples
from ..fold import fold
from ..inputs import (
    FullPrecision,
    Output,
    UnsupportedLayerError,
    batched,
    copied,
    full_precision,
    memory,
    own,
    probed,
    tensors,
    unwrapped,
)  # fmt: skip
from .collectors import Absolutes, Collected, InputMoments, PerWeight, Squares, Sums
from .rules import DIRECT, RuleLike, bounded, chooser
from .samples import STARTS, scored_weights, start_gradient
from .saved import Saved
from .trace import Propagation

WANTED: dict[str, type[PerWeight]] = {
    "sum": Sums, "abs": Absolutes, "rms": Squares, "moments": InputMoments,
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
        moving = _moving(private, scored, image)
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
        held = (*network.named_buffers(), *network.named_parameters())
        saved.check({memory(value): name for name, value in held})
        if self.propagate.shares and image.is_floating_point():
            self.collector.follow(0)
            try:
                traced = self.propagate(own(image, network).requires_grad_())
                self.collector.shares = True
            except UnsupportedLayerError:  # what is made of the images first has no rule: constants
                self.collector.follow(0)
                traced = self.propagate(own(image, network))
        if not torch.allclose(traced, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max())):
            raise UnsupportedLayerError(
                "the traced forward pass differs from the model's: evaluation mode is random, or "
                "a tensor is changed in place where torch's functions do not see it"
            )
        made, steps = self.propagate.made, _steps([traced, *self.propagate.held])
        if unseen := sorted(moving - {made[step] for step in steps if step in made}):
            raise UnsupportedLayerError(
                f"the weight {unseen[0]!r} moves the outputs where no function of torch shows it, "
                "so that it would have no relevance: replace compiled code, autograd functions of "
                "your own and reentrant checkpoints by torch's functions"
            )
        layers = self.propagate.visited
        self.collector.direct = any(rule.name in DIRECT for rule in layers.values())
        for pattern in rule if isinstance(rule, Mapping) else ():
            if not any(fnmatchcase(path, pattern) for path in layers):
                raise ValueError(f"no layer fits {pattern!r}; layers: {', '.join(layers)}")

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [batch, ...] and labels [batch], on the model's device."""
        network = self.propagate.model
        self._tell_apart()
        for part in batched(len(self.images), self.batch_size):
            yield own(self.images[part], network), own(self.labels[part], network)

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
            for images, labels in self.batches():
                images = self.collector.begin(images)
                if self.collector.shares:
                    images.requires_grad_()
                logits = self.propagate(images)  # [batch, classes]
                if self.collector.backwards:  # a sum: for gradients given, torch imports sympy
                    (logits * start_gradient(logits.detach(), labels, self.start)).sum().backward()
                self.collector.end()
        return self.collector


def _steps(outputs: Iterable[Tensor]) -> set[Any]:
    """All steps of the graph by which gradients come back from outputs."""
    ahead, found = [t.grad_fn for t in outputs], set()
    while ahead:
        step = ahead.pop()
        if step is not None and step not in found:
            found.add(step)
            ahead += [before for before, _ in step.next_functions]
    return found


def _moving(network: nn.Module, scored: Mapping[str, Tensor], images: Tensor) -> set[str]:
    """Names of the scored weights on which the outputs depend, to ordinary gradients.

    None where there are no such gradients; what the forward pass cannot do is told elsewhere.
    """
    names = {id(weight): name for name, weight in scored.items()}
    found: set[str] = set()
    every = list(network.parameters())
    wanted = [p.requires_grad for p in every]
    try:
        for p in every:  # a model may keep what it makes of others, which must not bring gradients
            p.requires_grad_(id(p) in names)
        images = own(images, network)
        if images.is_floating_point():  # a reentrant checkpoint asks for it
            images = 1 * images.requires_grad_(True)
        with FullPrecision():
            outputs = [t for t in tensors(network(images)) if t.requires_grad]
        leaves = {id(getattr(step, "variable", None)) for step in _steps(outputs)}
        found = {name for place, name in names.items() if place in leaves}
        reduce(torch.add, [t.sum() for t in outputs]).backward()
        found |= {n for n, w in scored.items() if w.grad is not None and bool(w.grad.any())}
    except Exception:
        return found
    finally:
        for p, before in zip(every, wanted, strict=True):
            p.grad = None
            p.requires_grad_(before)
    return found


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
    wanted : {"sum", "abs", "rms", "moments"}
        Relevance summed; its absolute values or its squares in each sample summed; or, without
        any relevance, the squared input of each connection summed over samples and positions.

    Returns
    -------
    dict of str to Tensor
        Weight name -> total, shaped, typed and placed like the weight.

    Raises
    ------
    UnsupportedLayerError, ValueError
        As for ``weight_relevance``; also ValueError for an unknown ``wanted``.
    """
    if wanted not in WANTED:
        raise ValueError(f"unknown total {wanted!r}; known: {', '.join(WANTED)}")
    run = Run(WANTED[wanted], model, images, labels, **how)
    weights = dict(unwrapped(model).named_parameters())
    found = run.folded.stored(run.collect().found())
    # In half precision everything is computed in float32.
    return {name: total.to(weights[name].dtype) for name, total in found.items()}
