"""Criteria that are no relevance: the rivals and controls it is compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import views_of
from .checks import check_logits, check_samples
from .fold import fold
from .inputs import batched, copied, evaluated, own, probed
from .relevance import scored_weights, totals

Scores = dict[str, Tensor]


def _gradients(model: nn.Module, images: Tensor, labels: Tensor, start: str, wanted: str) -> Scores:
    """Weight times ordinary gradient of every sample, aggregated as relevance is."""
    return totals(model, images, labels, rule="lrp-0", start=start, wanted=wanted, ordinary=True)


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
    scaled = copied(model)
    total: Scores = {}
    originals = {name: w.detach().clone() for name, w in scored_weights(scaled).items()}
    for step in range(steps):
        alpha = (step + 0.5) / steps
        with torch.no_grad():
            for name, w in scored_weights(scaled).items():
                w.copy_(alpha * originals[name])
        for name, score in _gradients(scaled, images, labels, "target", "sum").items():
            total[name] = total.get(name, 0) + score / (alpha * steps)
    return total


def magnitude(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """Absolute value of the weight as trained: BatchNorm is not folded (Han et al. 2015)."""
    return {name: w.detach().abs() for name, w in scored_weights(model).items()}


def magnitude_folded(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """Absolute value of the weight with BatchNorm folded into it, as it is stored."""
    folded = fold(model, images)
    return folded.stored(magnitude(folded.network, images, labels))


def wanda(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """Absolute weight, as trained, times the norm of what it reads.

    Notes
    -----
    ``|w_jk| ‖a_j‖₂`` over samples and positions (Sun et al. 2024, arXiv 2306.11695, eq. 1).
    """
    squares = _gradients(model, images, labels, "target", "moments")
    return {n: w.detach().abs() * squares[n].sqrt() for n, w in scored_weights(model).items()}


def taylor(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """Squared first-order change of the mean loss when the weight is removed.

    Notes
    -----
    ``(w ∂L/∂w)²``, L the mean cross-entropy of all images (Molchanov et al. 2019, arXiv
    1906.10771, eq. 8).
    """
    total = _gradients(model, images, labels, "loss", "sum")
    return {name: (score / len(images)).square() for name, score in total.items()}


def fisher(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """Second-order change of the loss by the diagonal empirical Fisher information.

    Notes
    -----
    ``w² / 2 · mean_n (∂L_n/∂w)²`` with one gradient per sample (Theis et al. 2018, arXiv
    1801.05787).
    """
    total = _gradients(model, images, labels, "loss", "squares")
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
    private = evaluated(copied(model))
    weights = scored_weights(private)
    private.requires_grad_(False)
    for w in weights.values():
        w.requires_grad_(True)
    device = next(iter(weights.values())).device
    check_logits(probed(private, images[:2]), labels)
    generator = torch.Generator().manual_seed(seed)
    trace = dict.fromkeys(weights, 0.0)
    for _ in range(probes):
        signs = [
            (2 * torch.randint(2, w.shape, generator=generator) - 1).to(w) for w in weights.values()
        ]
        for part in batched(len(images), batch_size):
            x, y = own(images[part], private), labels[part].long().to(device)
            with torch.enable_grad():
                loss = F.cross_entropy(private(x), y, reduction="sum") / len(images)
                grads = torch.autograd.grad(
                    loss, list(weights.values()), create_graph=True, materialize_grads=True
                )
                along = torch.stack(
                    [(g * v).sum() for g, v in zip(grads, signs, strict=True)]
                ).sum()
                curved = torch.autograd.grad(along, list(weights.values()), materialize_grads=True)
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


def alike(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """One for every weight: what criteria are compared with."""
    return {name: torch.ones_like(w) for name, w in scored_weights(model).items()}


def units_alike(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """One for every unit [units]."""
    views = views_of(model)
    return {
        name: torch.ones(w.shape[1] * views[name].groups if name in views and views[name].turned
                         else len(w))
        for name, w in scored_weights(model).items()
    }  # fmt: skip
