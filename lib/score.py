"""Scores: how much each weight matters, by one of many criteria.

The simplest is weight x gradient, ``w ∂z_t/∂w`` with z_t the logit of the true class, summed over
reference images (``weight_times_gradient``). On a ReLU network layer-wise relevance propagation
with the ε rule is exactly this, since ReLU passes activations and their gradients alike. What LRP
adds are other rules, activations and starts; ``lib.relevance`` has it in its general form.

A criterion is an object: ``CRITERIA[name](model, images, labels) -> {weight name: scores}``, each
shaped like its weight; the higher, the more important. Names are those of ``CRITERIA`` and

- ``lrp-<rule>``, ``lrp-<rule>/<start>``, ``lrp-<rule>/<start>/<aggregate>``: relevance, with any
  rule, composite, start and aggregate of ``lib.relevance``, as in ``lrp-zplus/contrastive/abs``;
- ``reversed:<criterion>``: ranks the other way around, ``shuffled:<criterion>``: the same values
  dealt out at random (controls, as ``random``); ``root:<criterion>``, ``three-quarters:…``: powers.

To add one: ``CRITERIA["mine"] = Criterion("mine", function)``, or pass the object itself.
"""

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from . import baselines
from .attention import views_of
from .checks import check_logits, check_samples
from .fold import fold
from .inputs import own, split
from .moments import input_moments
from .relevance import AGGREGATES, COMPOSITES, RULES, STARTS, scored_weights, unit_sensitivity
from .relevance import weight_relevance as lrp
from .relevance.deeplift import deeplift

Scores = dict[str, Tensor]
Function = Callable[[nn.Module, Tensor, Tensor], Scores]


@torch.inference_mode(False)
@torch.enable_grad()
def weight_times_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """Weight times gradient of the true class's logit, summed over images: LRP in five lines."""
    check_samples(images, labels)
    folded = fold(model, images)
    network = folded.network.requires_grad_(True)  # a copy, in evaluation mode
    weights = scored_weights(network)
    for x, y in zip(split(images, 50), split(labels, 50), strict=True):
        logits, y = network(own(x, network)), y.to(next(network.parameters()).device).long()
        check_logits(logits, y)
        logits.gather(1, y[:, None]).sum().backward()
    scores = {n: w.detach() * (0 if w.grad is None else w.grad) for n, w in weights.items()}
    return folded.stored(scores)


@dataclass(frozen=True)
class Wrapper:
    """A change of any criterion, with one meaning for scores of weights and of units.

    Attributes
    ----------
    name : str
        Stands before a colon in front of a criterion's name.
    scores, units : callable
        Applied to all values of a network in one vector; a result of the same length.
    """

    name: str
    scores: Callable[[Tensor], Tensor]
    units: Callable[[Tensor], Tensor]

    def __call__(self, inner: "Criterion") -> "Criterion":
        """The changed criterion."""
        return replace(inner, name=f"{self.name}:{inner.name}", changes=(*inner.changes, self))


@dataclass(frozen=True)
class Criterion:
    """One way to score weights, and the units that follow from it.

    Attributes
    ----------
    name : str
        In tables and error messages.
    function : callable
        ``(model, images, labels) -> scores``; neither changes the model nor depends on the state
        of any generator.
    order : {1, 2}
        1 for scores like a change of the output (relevance), 2 for squares of it or of gradients.
    as_trained : bool
        The score belongs to the weight as trained: where BatchNorm was folded into it, the gain
        is divided out.
    unit_function : callable, optional
        The same call, giving a non-negative value for each output unit; by default it follows
        from the scores, see ``units``.
    changes : tuple of Wrapper
        Applied to scores and units, the first one first.
    """

    name: str
    function: Function
    order: int = 1
    as_trained: bool = False
    unit_function: Function | None = None
    changes: tuple[Wrapper, ...] = ()

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, gains: Scores | None = None
    ) -> Scores:
        """Scores of all weights by name; arguments and errors as of ``weight_relevance``.

        ``gains``, as of ``Folded.scales``, are divided out of scores of weights as trained.
        """
        scores = self.function(model, images, labels)
        if gains is not None and self.as_trained:
            scores = {name: score / gains[name] for name, score in scores.items()}
        for change in self.changes:
            scores = unpooled(change.scores(pooled(scores)), scores)
        return scores

    def units(self, model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
        """Weigh the squared error of each output unit by what the criterion says about it.

        Parameters
        ----------
        model : nn.Module
            The network whose weights will be quantized, BatchNorm folded.
        images, labels : Tensor
            Reference images [N, ...] and labels [N].

        Returns
        -------
        dict of str to Tensor
            float32 [units] for each weight, with mean one over the network: prices stay the same.

        Notes
        -----
        For relevance, the mean square of ``R_k / z_k``. Scores s of second order say about unit k
        ``G_k = sum_j |s_kj| / sum_j w_kj^2 H_jj``, H the second moment of the layer's inputs (for
        Fisher information this is the mean squared gradient at the unit); scores of first order
        the same with ``s^2``.
        """
        if self.unit_function:
            units = self.unit_function(model, images, labels)
        else:
            units = self._from_scores(model, images, labels)
        mean = _positive(torch.cat(list(units.values())).mean())
        units = {name: (unit / mean).float() for name, unit in units.items()}
        for change in self.changes:
            units = unpooled(change.units(pooled(units)), units)
        return units

    def _from_scores(self, model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
        scores, units, views = self.function(model, images, labels), {}, views_of(model)
        for name, moment in input_moments(model, images).items():
            weight, view = model.get_parameter(name).detach(), views[name]
            score = scores[name].abs() if self.order == 2 else scores[name].square()
            diagonal = moment.diagonal(dim1=-2, dim2=-1).reshape(view.groups, 1, view.inputs)
            energy = (view.rows(weight).square() * diagonal).sum(-1)  # [groups, rows]
            total = view.rows(score).sum(-1)
            if view.looks_up:  # a unit is a token
                energy, total = energy.sum(1), total.sum(1)
            energy, total = energy.reshape(-1), total.reshape(-1)
            units[name] = torch.where(energy > 0, total / energy.clamp_min(1e-30), 0.0)
        return units


By = str | Criterion


def pooled(tensors: Scores) -> Tensor:
    """All values of a network in one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def unpooled(values: Tensor, like: Scores) -> Scores:
    """The inverse of ``pooled``, names and shapes as there."""
    parts = values.split([tensor.numel() for tensor in like.values()])
    return {name: part.reshape(like[name].shape) for name, part in zip(like, parts, strict=True)}


def _shuffled(values: Tensor) -> Tensor:
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    return values[order.to(values.device)]


def _in_reverse(values: Tensor) -> Tensor:
    """The same values dealt out in the opposite order: least to greatest and back."""
    order, dealt = values.argsort(), values.clone()
    dealt[order] = values[order.flip(0)]
    return dealt


def _power(name: str, exponent: float) -> Wrapper:
    def units(values: Tensor) -> Tensor:
        powers = values**exponent
        return powers / _positive(powers.mean())

    return Wrapper(name, lambda scores: scores.sign() * scores.abs() ** exponent, units)


def _positive(mean: Tensor) -> Tensor:
    return mean.clamp_min(torch.finfo(torch.float32).tiny)


WRAPPERS = {
    wrapper.name: wrapper
    for wrapper in (
        Wrapper("reversed", torch.neg, _in_reverse),
        Wrapper("shuffled", _shuffled, _shuffled),
        _power("root", 0.5),
        _power("three-quarters", 0.75),
    )
}


class UnknownCriterionError(KeyError, ValueError):
    """No criterion of that name; the message lists the known ones."""

    __str__ = Exception.__str__


class Criteria(MutableMapping[str, Criterion]):
    """Criteria by name; iteration gives the plain names, look-up understands all of them."""

    def __init__(self, *criteria: Criterion):
        self._own = {criterion.name: criterion for criterion in criteria}

    def __getitem__(self, name: str) -> Criterion:
        if name in self._own:
            return self._own[name]
        wrapper, _, inner = name.partition(":")
        if wrapper in WRAPPERS and inner:
            return WRAPPERS[wrapper](self[inner])
        return self._relevance(name)

    def __setitem__(self, name: str, criterion: Criterion) -> None:
        if not isinstance(criterion, Criterion):
            raise TypeError(f"{name!r} must be a Criterion, not a {type(criterion).__name__}")
        if not name or set(name) & set(":/") or name.startswith("lrp-"):
            raise ValueError(f"{name!r} cannot name a criterion: no ':', no '/', no 'lrp-'")
        self._own[name] = criterion

    def __delitem__(self, name: str) -> None:
        del self._own[name]

    def __iter__(self) -> Iterator[str]:
        rules = ("epsilon", "0", "zplus", "gamma", "alpha2beta1", *COMPOSITES)
        return iter([*(f"lrp-{rule}" for rule in rules), *self._own])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _relevance(self, name: str) -> Criterion:
        rule, *options = name.removeprefix("lrp-").split("/")
        rule = "lrp-0" if rule == "0" else rule
        start = options.pop(0) if options and options[0] in STARTS else "target"
        aggregate = options.pop(0) if options and options[0] in AGGREGATES else "sum"
        if not name.startswith("lrp-") or options or rule not in (*RULES, *COMPOSITES):
            raise UnknownCriterionError(
                f"unknown criterion {name!r}; known: {', '.join(self)}, any lrp-<rule> with "
                f"/<start> of {', '.join(STARTS)} and /<aggregate> of {', '.join(AGGREGATES)}, "
                f"and <change>:<criterion> with a change of {', '.join(WRAPPERS)}"
            )
        return Criterion(
            name,
            lambda m, x, y: lrp(m, x, y, rule=rule, start=start, aggregate=aggregate),
            unit_function=lambda m, x, y: unit_sensitivity(m, x, y, rule=rule, start=start),
        )


CRITERIA = Criteria(
    Criterion("deeplift", deeplift),
    Criterion("grad-times-weight", weight_times_gradient),
    Criterion("integrated-gradients", baselines.integrated_gradients),
    Criterion("magnitude", baselines.magnitude, as_trained=True),
    Criterion("magnitude-folded", baselines.magnitude_folded),
    Criterion("wanda", baselines.wanda, as_trained=True),
    Criterion("taylor", baselines.taylor, order=2),
    Criterion("fisher", baselines.fisher, order=2),
    Criterion("hessian-trace", baselines.hessian_trace, order=2),
    Criterion("random", baselines.random),
    Criterion("alike", baselines.alike, unit_function=baselines.units_alike),
)


def criterion(by: By) -> Criterion:
    """The criterion of a name, or the object itself."""
    return by if isinstance(by, Criterion) else CRITERIA[by]
