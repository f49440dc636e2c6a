"""Rate–distortion choice of codes: relevance-weighted damage against bits, errors compensated."""

import math

import torch
from torch import Tensor

from lib.quantize.codes import Codes, check, kept_weight, mask_like, storable

DAMPING = 0.05  # added to the diagonal of a second moment, relative to its mean
SWEEPS = 5  # most passes of coordinate descent


def rd_step(weight: Tensor, second_moment: Tensor, unit_weight: Tensor | None,
            lam: float) -> float:
    """Step of the uniform grid that suits a price of bits.

    Parameters
    ----------
    weight, second_moment, unit_weight
        As for :func:`rate_distortion`.
    lam : float
        Positive; as for :func:`rate_distortion`.

    Returns
    -------
    float
        The step, representable in float16; between 2^-14 and 2.01 times the largest |weight|,
        where every weight is kept or rounds to zero.

    Raises
    ------
    ValueError
        If an input is not finite or does not fit, or lam is not positive.

    Notes
    -----
    On a fine grid of step Δ a weight takes h − log2 Δ bits and does c Δ²/12 damage with
    c = mean_k G_k · mean_j M_jj², in the terms of :func:`rate_distortion` and without the share
    of the damping. A bit is worth its price where −dD/dR = c Δ² ln 2 / 6 = λ, hence

        Δ² = 6 λ / (c ln 2).

    References
    ----------
    Gish, Pierce: Asymptotically efficient quantizing, IEEE Trans. Information Theory 1968.
    """
    weight = kept_weight(weight, None)
    moment, units, _ = _problem(weight, second_moment, unit_weight)
    return _rd_step(weight, *_triangular(moment), units, lam)


def energy(weight: Tensor, second_moment: Tensor, unit_weight: Tensor | None = None) -> float:
    """Damage that removing all weights would do; what a price of bits can be measured by.

    Parameters
    ----------
    weight, second_moment, unit_weight
        As for :func:`rate_distortion`.

    Returns
    -------
    float
        Σ_k G_k w_kᵀ H w_k, per image.

    Raises
    ------
    ValueError
        If an input is not finite or does not fit.
    """
    weight = kept_weight(weight, None)
    moment, units, order = _problem(weight, second_moment, unit_weight)
    rows = weight.reshape(len(moment), -1, len(moment[0]))[:, :, order]
    return float(((rows @ moment * rows).sum(2).flatten() * units).sum())


def rate_distortion(weight: Tensor, *, second_moment: Tensor, unit_weight: Tensor | None = None,
                    step: float | None = None, lam: float, mask: Tensor | None = None,
                    compensate: bool = True) -> Codes:
    """Choose codes that trade the damage at the layer's output against the bits they take.

    Parameters
    ----------
    weight : Tensor
        Float weights [units, ...], d = weight[0].numel().
    second_moment : Tensor
        Float [d, d], or [groups, d, d] for a grouped convolution: H of
        ``reconstruct.input_moments``, a sum over positions and a mean over images.
    unit_weight : Tensor, optional
        Non-negative [units], what the squared error of an output unit at one position costs;
        relevance enters here, as the mean square of R/z. Ones by default.
    step : float, optional
        Step of the grid; :func:`rd_step` by default.
    lam : float
        Damage that saving a bit may do, per image. Damages of layers add up, so one lam serves a
        whole network.
    mask : Tensor, optional
        bool, shaped like the weight, True = kept; the others decode to zero, and what that costs
        is compensated as well.
    compensate : bool
        Let the weights of a unit make up for each other's errors; otherwise each weight is coded
        for itself, by the diagonal of H.

    Returns
    -------
    Codes
        Of kind "uniform".

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

    References
    ----------
    Frantar, Alistarh: Optimal Brain Compression, NeurIPS 2022, section 5. Frantar et al.: GPTQ,
    ICLR 2023, section 3. Behdin et al.: QuantEase, 2023 (coordinate descent).
    """
    kept, weight = mask_like(weight, mask), kept_weight(weight, None)
    moment, units, order = _problem(weight, second_moment, unit_weight)
    factor, moment, damping = _triangular(moment)
    step = _rd_step(weight, factor, moment, damping, units, lam) if step is None else step
    check(0 < step < math.inf, f"the step must be positive, not {step}")
    check(0 <= lam < math.inf, f"lam must not be negative, not {lam}")
    step = float(storable(torch.tensor(step)))
    top = math.ceil(float(weight.abs().max()) / step) + 1
    check(top < 2**15, f"step {step} is too fine: it takes symbols up to {top}")
    groups, inputs = moment.shape[:2]
    scaled = weight.reshape(groups, -1, inputs).mT[:, order] / step
    kept = kept.reshape(groups, -1, inputs).mT[:, order]
    symbols, damage = scaled.round() * kept, units.reshape(groups, 1, -1) * step**2
    for turn in range(2 + SWEEPS):
        before, bits = symbols, lam * _code_lengths(symbols, top)
        if compensate:
            quadratic = factor if turn < 2 else moment
            symbols = _code_columns(scaled, symbols, kept, quadratic, damage, bits)
        else:
            energy = (moment.diagonal(dim1=1, dim2=2) - damping)[..., None]
            symbols = _cheapest(scaled, energy * damage, bits) * kept
        if turn > 1 and (symbols != before).float().mean() < 0.01:
            break
    symbols = symbols[:, order.argsort()].mT.reshape(weight.shape).int()
    return Codes(symbols, torch.tensor([step]), "uniform")


def _problem(weight, second_moment, unit_weight):
    """Checked unit weights [units], second moment [groups, d, d] in the order of columns."""
    moment = second_moment.detach().float().cpu()
    moment = moment if moment.ndim == 3 else moment[None]
    inputs = weight[0].numel()
    check(moment.ndim == 3 and moment.shape[1:] == (inputs, inputs)
           and len(weight) % len(moment) == 0, f"second_moment is {list(second_moment.shape)}, "
           f"the weight {list(weight.shape)} has {inputs} inputs a unit")
    check(bool(moment.isfinite().all()), "second_moment holds values that are not finite")
    units = torch.ones(len(weight)) if unit_weight is None else unit_weight.detach().float().cpu()
    check(units.shape == weight.shape[:1], f"unit_weight is {list(units.shape)} for "
           f"{len(weight)} units")
    check(bool((units >= 0).all() & units.isfinite().all()),
           "unit_weight is negative or not finite")
    order = moment.diagonal(dim1=1, dim2=2).mean(0).argsort(descending=True, stable=True)
    return moment[:, order][:, :, order], units, order


def _triangular(moment):
    """Upper triangular M with M Mᵀ = H, the damped H, both [groups, d, d], and the damping."""
    damping = (DAMPING * moment.diagonal(dim1=1, dim2=2).mean(1)).clamp(min=1e-30)[:, None]
    damped = moment + torch.diag_embed(damping.expand(moment.shape[:2]))
    factor, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
    check(not failed.any(), "second_moment is not positive semidefinite")
    return factor.flip(1, 2), damped, damping


def _rd_step(weight, factor, moment, damping, units, lam):
    check(0 < lam < math.inf, f"lam must be positive to derive a step, not {lam}")
    energy = factor.diagonal(dim1=1, dim2=2).square() - damping
    cost = float((energy.mean(1) * units.reshape(len(energy), -1).mean(1)).mean())
    largest = float(weight.abs().max()) or 1.0
    step = math.sqrt(6 * lam / (cost * math.log(2))) if cost > 0 else math.inf
    return float(storable(torch.tensor(min(max(step, largest / 2**14), 2.01 * largest))))


def _code_lengths(symbols, top):
    """Bits [2·top + 1] of the symbols −top … top by their present distribution, smoothed."""
    counts = torch.bincount((symbols + top).long().flatten(), minlength=2 * top + 1) + 0.1
    return -(counts / counts.sum()).log2().float()


def _cheapest(target, damage, bits):
    """Symbols of least damage · (target − s)² + bits, among the nearest, the next and zero."""
    top = len(bits) // 2
    nearest = target.round().clamp_(-top, top)
    trials = torch.stack([nearest, nearest - nearest.sign(), torch.zeros_like(nearest)])
    cost = damage * (target - trials).square_() + bits[(trials + top).long()]
    return trials.gather(0, cost.argmin(0, keepdim=True)).squeeze(0)


def _code_columns(scaled, symbols, kept, quadratic, damage, bits, block=128):
    """Code columns [groups, d, units] in turn, errors fed forward by a quadratic form.

    ``quadratic`` is M, for errors of earlier columns, or H, for errors of all others. Feedback is
    gathered by matrix products for a block of columns, and column by column within.
    """
    symbols, diagonal = symbols.clone(), quadratic.diagonal(dim1=1, dim2=2)
    coupling = quadratic / diagonal[:, None] - torch.eye(len(diagonal[0]))
    triangular = not quadratic.tril(-1).any()
    energy = diagonal.square() if triangular else diagonal
    errors = scaled - symbols
    for start in range(0, scaled.shape[1], block):
        stop = min(start + block, scaled.shape[1])
        past = slice(0, stop) if triangular else slice(None)
        targets = scaled[:, start:stop] + coupling[:, past, start:stop].mT @ errors[:, past]
        for j in range(start, stop):
            symbol = _cheapest(targets[:, j - start], energy[:, j, None] * damage[:, 0], bits)
            symbols[:, j] = symbol * kept[:, j]
            error = scaled[:, j] - symbols[:, j]
            targets[:, j - start + 1:].baddbmm_(coupling[:, j, j + 1:stop, None],
                                                (error - errors[:, j])[:, None])
            errors[:, j] = error
    return symbols
