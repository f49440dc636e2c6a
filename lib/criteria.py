"""Criteria: ways to give every weight a score, all with the same call.

``CRITERIA[name](model, images, labels) -> scores``: a dict from weight name to a tensor like the
weight; the higher, the more important. A criterion neither changes the model nor depends on any
generator's state.

Names are ``deeplift``, ``magnitude``, ... and

- ``lrp-<rule>``, ``lrp-<rule>/<start>``, ``lrp-<rule>/<start>/<aggregate>``: relevance, with any
  rule, composite, start and aggregate of ``lib.relevance``, as in ``lrp-zplus/contrastive/abs``;
  ``lrp-<rule>/<aggregate>`` keeps the start ``target``;
- ``reversed:<criterion>``: any of them negated, the control that must do worse.
"""

import copy
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.models import fold_batchnorm
from lib.relevance import AGGREGATES, COMPOSITES, RULES, STARTS, weight_relevance
from lib.relevance.data import check_logits, check_samples, scored_weights
from lib.relevance.deeplift import deeplift
from lib.relevance.run import Run

Scores = dict[str, Tensor]
Criterion = Callable[[nn.Module, Tensor, Tensor], Scores]


class UnknownCriterionError(KeyError, ValueError):
    """No criterion of that name."""

    __str__ = Exception.__str__


def _totals(run: Run) -> Scores:
    for _ in run.batches():
        pass
    return run.totals


def grad_times_weight(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """Weight times gradient of the true class's logit, summed over samples.

    Notes
    -----
    ``w ∂(Σ_n z_{n,t})/∂w``. For a ReLU network this is ``lrp-0`` (Ancona et al. 2018, prop. 1,
    applied to weights).
    """
    return _totals(Run(model, images, labels, "lrp-0", "target", "sum", ordinary=True))


def integrated_gradients(
    model: nn.Module, images: Tensor, labels: Tensor, steps: int = 16
) -> Scores:
    """Integrated gradients of the true class's logit along a path of the weights.

    Notes
    -----
    ``w ∫_0^1 ∂f(αw)/∂w dα``, all scored weights shrinking together from zero, midpoint rule;
    biases and normalisation stay. The sum over all weights approaches ``f(w) - f(0)``, f being
    the summed logit (Sundararajan et al. 2017, arXiv 1703.01365, eq. 1 with weights as inputs).
    """
    scaled, total = copy.deepcopy(model), {}
    originals = {name: w.detach().clone() for name, w in scored_weights(scaled).items()}
    for step in range(steps):
        alpha = (step + 0.5) / steps
        with torch.no_grad():
            for name, w in scored_weights(scaled).items():
                w.copy_(alpha * originals[name])
        for name, score in grad_times_weight(scaled, images, labels).items():
            total[name] = total.get(name, 0) + score / (alpha * steps)
    return total


def magnitude(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """Absolute value of the weight as trained: BatchNorm is not folded (Han et al. 2015)."""
    return {name: w.detach().abs() for name, w in scored_weights(model).items()}


def magnitude_folded(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """Absolute value of the weight with BatchNorm folded into it, as it is stored."""
    return magnitude(fold_batchnorm(model), images, labels)


def wanda(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """Absolute weight, as trained, times the norm of what it reads.

    Notes
    -----
    ``|w_jk| ‖a_j‖₂`` over samples and positions (Sun et al. 2024, arXiv 2306.11695, eq. 1).
    """
    squares = _totals(Run(model, images, labels, "lrp-0", "target", "moments", ordinary=True))
    return {n: w.detach().abs() * squares[n].sqrt() for n, w in scored_weights(model).items()}


def taylor(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """Squared first-order change of the mean loss when the weight is removed.

    Notes
    -----
    ``(w ∂L/∂w)²``, L the mean cross-entropy of all images (Molchanov et al. 2019, arXiv
    1906.10771, eq. 8).
    """
    total = _totals(Run(model, images, labels, "lrp-0", "loss", "sum", ordinary=True))
    return {name: (score / len(images)).square() for name, score in total.items()}


def fisher(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """Second-order change of the loss by the diagonal empirical Fisher information.

    Notes
    -----
    ``w² / 2 · mean_n (∂L_n/∂w)²`` with one gradient per sample (Theis et al. 2018, arXiv
    1801.05787).
    """
    total = _totals(Run(model, images, labels, "lrp-0", "loss", "rms", ordinary=True))
    return {name: score / (2 * len(images)) for name, score in total.items()}


def hessian_trace(
    model: nn.Module, images: Tensor, labels: Tensor, *, probes: int = 4, seed: int = 0,
    batch_size: int = 50,
) -> Scores:  # fmt: skip
    """Squared weight times the mean Hessian trace of its layer.

    Notes
    -----
    ``w² tr(H_l) / n_l`` with H_l the Hessian of the mean cross-entropy for the n_l weights of layer
    l, the trace by Hutchinson's estimator ``E[vᵀ H v]``, v = ±1: HAWQ-V2's sensitivity of a layer
    (Dong et al. 2020, arXiv 1911.03852), for the removal of one weight at a time.
    """
    check_samples(images, labels)
    private = copy.deepcopy(model).eval()
    weights = scored_weights(private)
    private.requires_grad_(False)
    for w in weights.values():
        w.requires_grad_(True)
    device = next(iter(weights.values())).device
    with torch.no_grad():
        check_logits(private(images[:1].to(device)), labels)
    generator = torch.Generator().manual_seed(seed)
    trace = dict.fromkeys(weights, 0.0)
    for _ in range(probes):
        signs = [
            (2 * torch.randint(2, w.shape, generator=generator) - 1).to(w) for w in weights.values()
        ]
        for first in range(0, len(images), batch_size):
            x, y = (t[first : first + batch_size].to(device) for t in (images, labels))
            with torch.enable_grad():
                loss = F.cross_entropy(private(x), y, reduction="sum") / len(images)
                grads = torch.autograd.grad(
                    loss, weights.values(), create_graph=True, materialize_grads=True
                )
                along = sum((g * v).sum() for g, v in zip(grads, signs, strict=True))
                curved = torch.autograd.grad(along, weights.values(), materialize_grads=True)
            for name, c, v in zip(weights, curved, signs, strict=True):
                trace[name] += float((c * v).sum()) / probes
    return {n: w.detach().square() * (trace[n] / w.numel()) for n, w in weights.items()}


def random(model: nn.Module, images: Tensor, labels: Tensor, seed: int = 0) -> Scores:
    """Standard normal scores, half of them negative: the control that every criterion must beat."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(w.shape, generator=generator).to(w)
        for name, w in scored_weights(model).items()
    }


_BASELINES: dict[str, Criterion] = {
    "deeplift": deeplift,
    "grad-times-weight": grad_times_weight,
    "integrated-gradients": integrated_gradients,
    "magnitude": magnitude,
    "magnitude-folded": magnitude_folded,
    "wanda": wanda,
    "taylor": taylor,
    "fisher": fisher,
    "hessian-trace": hessian_trace,
    "random": random,
}


def relevance_choices(name: str) -> tuple[str, str, str]:
    """Read a criterion ``lrp-<rule>``, with ``/<start>`` and ``/<aggregate>`` where not default.

    Parameters
    ----------
    name : str
        Such as ``lrp-zplus`` or ``lrp-epsilon/contrastive/abs``.

    Returns
    -------
    rule, start, aggregate : str
        As ``lib.relevance.weight_relevance`` takes them.

    Raises
    ------
    UnknownCriterionError
        Not such a name; the message lists what is known.
    """
    rule, *options = name.removeprefix("lrp-").split("/")
    rule = "lrp-0" if rule == "0" else rule
    start = options.pop(0) if options and options[0] in STARTS else "target"
    aggregate = options.pop(0) if options and options[0] in AGGREGATES else "sum"
    if not name.startswith("lrp-") or options or rule not in (*RULES, *COMPOSITES):
        raise UnknownCriterionError(
            f"unknown criterion {name!r}; known: {', '.join(CRITERIA)}, any lrp-<rule> with "
            f"/<start> of {', '.join(STARTS)} and /<aggregate> of {', '.join(AGGREGATES)}, "
            "and reversed:<criterion>"
        )
    return rule, start, aggregate


def _relevance(name: str) -> Criterion:
    rule, start, aggregate = relevance_choices(name)

    def relevance(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
        return weight_relevance(model, images, labels, rule=rule, start=start, aggregate=aggregate)

    return relevance


def _reversed(criterion: Criterion) -> Criterion:
    def negated(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
        return {name: -score for name, score in criterion(model, images, labels).items()}

    return negated


class _Criteria(Mapping[str, Criterion]):
    """Criteria by name; iteration gives the plain names, look-up understands all of them."""

    def __getitem__(self, name: str) -> Criterion:
        if name in _BASELINES:
            return _BASELINES[name]
        if name.startswith("reversed:"):
            return _reversed(self[name.removeprefix("reversed:")])
        return _relevance(name)

    def __iter__(self) -> Iterator[str]:
        rules = ("epsilon", "0", "zplus", "gamma", "alpha2beta1", *COMPOSITES)
        return iter([*(f"lrp-{rule}" for rule in rules), *_BASELINES])

    def __len__(self) -> int:
        return len(list(iter(self)))


CRITERIA: Mapping[str, Criterion] = _Criteria()
