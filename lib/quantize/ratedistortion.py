"""Rate–distortion choice of codes: relevance-weighted damage against bits, errors compensated."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..attention import views_of
from ..codes import Codes, check, kept_weight, mask_like, storable
from ..linear import View
from ..moments import input_moments
from ..progress import each
from ..prune import Removed
from ..score import By, criterion
from ..warning import warn
from .columns import code_columns, code_lengths
from .quantizer import Quantizer
from .sizes import SAMPLE, Problem, Sample, step_of
from .uniform import uniform

DAMPING = 0.05  # added to the diagonal of a second moment, relative to its mean
SWEEPS = 5  # most passes of coordinate descent
TRIES = 3  # dampings tried, each four times the one before
OTHERS = 0.01  # share of weights without moments from which they deserve a warning
NOISE = 0.01  # largest eigenvalue below zero for rounding, relative to the largest diagonal entry


@dataclass(frozen=True)
class RateDistortion(Quantizer):
    """Codes that minimise damage at the layers' outputs + price x bits.

    Attributes
    ----------
    by : str or Criterion
        Weighs the squared error of each output unit, see ``Criterion.units``.
    price : float
        Of a bit: the damage that saving one may do, in units of what removing all weights would
        do, divided by their number. So it means about the same for every network: near 0.01
        weights take two bits, at 10 hardly any is left.
    """

    knob = "price"
    settings = tuple(10 ** (step / 20 - 12) for step in range(261))
    by: By = "lrp-epsilon/contrastive"
    price: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        criterion(self.by)
        check(0 < self.price < math.inf, f"price must be positive, not {self.price}")

    def prepare(self, removed: Removed, images: Tensor, labels: Tensor) -> Problem:
        """Moments, weights of the units and the unit of damage."""
        moments = input_moments(removed.network, images, centered=True)
        units = criterion(self.by).units(removed.network, images, labels)
        views = views_of(removed.network)
        names = sorted(removed.masks.keys() & moments.keys())
        weights = {name: removed.network.get_parameter(name).detach() for name in names}
        total = sum(
            energy(**_rows(views[name], weight, moments[name], units[name]))
            for name, weight in weights.items()
        )
        # A network whose outputs are all zero has no damage to measure by; any price will do.
        damage = total / max(1, sum(weight.numel() for weight in weights.values())) or 1.0
        return Problem(moments, units, damage, views)

    def expected(
        self, removed: Removed, prepared: Problem, images: Tensor
    ) -> Callable[[float], float]:
        """Size by the price: the entropy of weights on the grids that suit it.

        Errors are not made up for: what the real files show sets that right.
        """
        samples = [
            _sample(
                prepared.views[name], removed.network.get_parameter(name).detach(), moment,
                prepared.units[name],
            )
            for name, moment in prepared.moments.items()
            if name in removed.masks.keys() & prepared.units.keys()
        ]  # fmt: skip
        weights = sum(mask.numel() for mask in removed.masks.values())
        return cache(lambda price: sum(s.bits(price * prepared.damage) for s in samples) / weights)

    def codes(
        self, weights: dict[str, Tensor], masks: dict[str, Tensor], prepared: Problem
    ) -> dict[str, Codes]:
        """See ``rate_distortion``; layers whose inputs have no known moment get eight bits."""
        codes = {}
        warn_of_others(weights.keys() - prepared.moments.keys(), masks)
        for name, weight in each(weights.items()):
            if name in prepared.moments:
                codes[name] = coded(
                    prepared.views[name], weight, masks[name], prepared.moments[name],
                    prepared.units[name], self.price * prepared.damage,
                )  # fmt: skip
            else:
                codes[name] = uniform(weight, 8, mask=masks[name])
        return codes


def warn_of_others(names: Iterable[str], masks: dict[str, Tensor]) -> None:
    """Name the weights to which no price applies, where they are more than 1 % of all."""
    names = sorted(names)
    share = sum(masks[name].numel() for name in names) / sum(m.numel() for m in masks.values())
    if share > OTHERS:
        warn(
            f"{share:.0%} of the weights take eight bits at any price, since what reads them is "
            f"not known: {', '.join(map(repr, names))}. Their layers do not run, run twice or for "
            "some images only, or are not called: layer(x), not F.linear(x, layer.weight)",
        )


def coded(
    view: View,
    weight: Tensor,
    mask: Tensor,
    moment: Tensor,
    units: Tensor,
    lam: float,
    step: float | None = None,
) -> Codes:
    """Codes of a weight of any layer, by ``rate_distortion`` of its rows."""
    problem: dict[str, Any] = _rows(view, weight, moment, units)
    kept = view.rows(mask).flatten(0, 1)
    code = rate_distortion(**problem, lam=lam, step=step, mask=kept)
    return replace(code, symbols=view.weight(code.symbols, weight.shape))


def _sample(view: View, weight: Tensor, moment: Tensor, units: Tensor) -> Sample:
    """Weights of a layer and what errors of theirs do; a moment may be of the first inputs only."""
    rows = view.rows(weight)
    some = rows[..., : moment.shape[-1]].flatten(0, 1)
    moment, units, order = _problem(some, moment, view.units(units, rows))
    factor, _, damping = _triangular(moment)
    energy = factor.diagonal(dim1=1, dim2=2).square()[:, None, order.argsort()]
    damage = (units.reshape(len(energy), -1, 1) * energy).flatten()
    some, every = some.cpu().flatten(), max(1, some.numel() // SAMPLE)
    cost, largest = _cost(factor, damping, units), float(some.abs().max()) or 1.0
    return Sample(weight.numel(), some[::every], damage[::every], cost, largest)


def _rows(view: View, weight: Tensor, moment: Tensor, units: Tensor) -> dict[str, Tensor]:
    rows = view.rows(weight)
    return {
        "weight": rows.flatten(0, 1),
        "second_moment": moment,
        "unit_weight": view.units(units, rows),
    }


def energy(weight: Tensor, second_moment: Tensor, unit_weight: Tensor | None = None) -> float:
    """Damage that removing all weights would do, per image: Σ_k G_k w_kᵀ H w_k.

    A price of bits can be measured by it. Arguments and errors as of :func:`rate_distortion`.
    """
    weight = kept_weight(weight, None)
    moment, units, order = _problem(weight, second_moment, unit_weight)
    rows = weight.reshape(len(moment), -1, len(moment[0]))[:, :, order]
    return float(((rows @ moment * rows).sum(2).flatten() * units).sum())


def rate_distortion(
    weight: Tensor, *, second_moment: Tensor, unit_weight: Tensor | None = None, lam: float,
    step: float | None = None, mask: Tensor | None = None,
) -> Codes:  # fmt: skip
    """Choose codes that trade the damage at the layer's output against the bits they take.

    Parameters
    ----------
    weight : Tensor
        Float weights [units, ...], d = weight[0].numel().
    second_moment : Tensor
        Float [d, d], or [groups, d, d] for a grouped convolution: H of
        ``lib.moments.input_moments``, a sum over positions and a mean over images.
    unit_weight : Tensor, optional
        Non-negative [units], what the squared error of an output unit at one position costs;
        relevance enters here, as the mean square of R/z. Ones by default.
    step : float, optional
        Step of the grid. By default the one that suits the price, representable in float16,
        between 2^-14 and 2.01 times the largest |weight|, where every weight is kept or rounds to
        zero.
    lam : float
        Damage that saving a bit may do, per image. Damages of layers add up, so one lam serves a
        whole network.
    mask : Tensor, optional
        bool, shaped like the weight, True = kept; the others decode to zero, and what that costs
        is compensated as well.

    Raises
    ------
    ValueError
        If an input is not finite or does not fit, or step or lam are unusable.

    Notes
    -----
    Minimised over the symbols s, with ŵ = Δ s, δ = w − ŵ and p the distribution of the symbols:

        Σ_k G_k δ_kᵀ H δ_k − λ Σ_kj log2 p(s_kj)

    H is damped by 5 % of its mean diagonal: with less, codes fit the reference images alone. With
    H = M Mᵀ, M upper triangular, the damage is Σ_kj G_k M_jj² (t_kj − ŵ_kj)², where the target
    t_kj = w_kj + Σ_{i<j} δ_ki M_ij / M_jj makes up for the columns before. Columns are coded one
    after the other, those of the largest H_jj first; this is the order of OBQ and GPTQ, written
    without the inverse of H. After two such passes, others improve each column with all the rest
    fixed, which is the same step with H in place of M, until fewer than 1 % of the symbols change;
    they matter most with masks, where M counts on weights that are not there. Each pass takes p
    from the one before.

    On a fine grid a weight takes h − log2 Δ bits and does c Δ²/12 damage with
    c = mean_k G_k · mean_j M_jj², without the share of the damping. A bit is worth its price where
    −dD/dR = c Δ² ln 2 / 6 = λ, hence the step Δ² = 6 λ / (c ln 2).

    References
    ----------
    Frantar, Alistarh: Optimal Brain Compression, NeurIPS 2022, section 5. Frantar et al.: GPTQ,
    ICLR 2023, section 3. Behdin et al.: QuantEase, 2023 (coordinate descent). Gish, Pierce:
    Asymptotically efficient quantizing, IEEE Trans. Information Theory 1968 (the step).
    """
    kept, weight = mask_like(weight, mask), kept_weight(weight, None)
    moment, units, order = _problem(weight, second_moment, unit_weight)
    factor, moment, damping = _triangular(moment)
    largest = float(weight.abs().max()) or 1.0
    check(0 <= lam < math.inf, f"lam must not be negative, not {lam}")
    if step is None:
        check(lam > 0, f"lam must be positive to derive a step, not {lam}")
        step = step_of(lam, _cost(factor, damping, units), largest)
    check(0 < step < math.inf, f"the step must be positive, not {step}")
    grid = storable(torch.tensor([step], dtype=torch.float32))
    step = float(grid)
    top = math.ceil(float(weight.abs().max()) / step) + 1
    check(top < 2**15, f"step {step} is too fine: it takes symbols up to {top}")
    groups, inputs = moment.shape[:2]
    scaled = weight.reshape(groups, -1, inputs).mT[:, order] / step
    kept = kept.reshape(groups, -1, inputs).mT[:, order]
    symbols, damage = scaled.round() * kept, units.reshape(groups, 1, -1) * step**2
    for turn in range(2 + SWEEPS):
        before, bits = symbols, lam * code_lengths(symbols, top)
        quadratic, triangular = (factor, True) if turn < 2 else (moment, False)
        symbols = code_columns(scaled, symbols, kept, quadratic, damage, bits, triangular)
        if turn > 1 and (symbols != before).float().mean() < 0.01:
            break
    back = order.argsort()
    symbols = symbols[:, back].mT.reshape(weight.shape).int()
    return Codes(symbols, grid, "uniform")


def _cost(factor: Tensor, damping: Tensor, units: Tensor) -> float:
    """Mean of G_k M_jj² over the weights of a layer, without the damping's share."""
    energy = factor.diagonal(dim1=1, dim2=2).square() - damping
    return float((energy.mean(1) * units.reshape(len(energy), -1).mean(1)).mean())


def _problem(
    weight: Tensor, second_moment: Tensor, unit_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Second moment [groups, d, d] in the order of coding, unit weights, the order [d]; checked."""
    moment = second_moment.detach().float().cpu()
    moment = moment if moment.ndim == 3 else moment[None]
    inputs = weight[0].numel()
    fits = moment.ndim == 3 and moment.shape[1:] == (inputs, inputs)
    check(
        fits and len(weight) % len(moment) == 0,
        f"second_moment is {list(second_moment.shape)}, "
        f"the weight {list(weight.shape)} has {inputs} inputs a unit",
    )
    check(moment.isfinite().all(), "second_moment holds values that are not finite")
    units = torch.ones(len(weight)) if unit_weight is None else unit_weight.detach()
    units = units.float().cpu()
    shaped = units.shape == weight.shape[:1]
    check(shaped, f"unit_weight is {list(units.shape)} for {len(weight)} units")
    check((units >= 0).all() & units.isfinite().all(), "unit_weight is negative or not finite")
    order = moment.diagonal(dim1=1, dim2=2).mean(0).argsort(descending=True, stable=True)
    return moment[:, order][:, :, order], units, order


def _triangular(moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Upper triangular M with M Mᵀ = H, the damped H, both [groups, d, d], and the damping."""
    mean = moment.diagonal(dim1=1, dim2=2).mean(1)[:, None]
    damping = (DAMPING * mean).clamp(min=1e-30)  # [groups, 1]
    for turn in range(TRIES + 1):
        damped = moment + torch.diag_embed(damping.expand(moment.shape[:2]))
        factor, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
        if not failed.any():
            break
        # Of few images, rounding may leave a moment with directions below zero ...
        more = 4 * damping
        if turn == TRIES - 1:  # ... and of the inputs of a group that never vary nothing else
            lowest = torch.linalg.eigvalsh(moment)[:, :1]
            most = NOISE * moment.diagonal(dim1=1, dim2=2).max()
            more = torch.maximum(more, -2 * lowest.clamp(min=-most))
        damping = torch.where(failed[:, None] > 0, more, damping)
    check(not failed.any(), "second_moment is not positive semidefinite")
    return factor.flip(1, 2), damped, damping
