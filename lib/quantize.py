"""Quantizers: weights, and what they matter, to integer codes on a small grid.

Every quantizer returns the same :class:`Codes`, on the CPU. Symbol 0 means a weight of exactly
zero, so pruned weights stay zero by construction. Grids hold float16 values because that is how
they are stored; symbols are chosen on the rounded grid, so storing it loses nothing.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

KINDS = ("uniform", "channel", "tier", "codebook")
CLIPS = torch.logspace(-1.2, 0, 80)  # clipping points tried, relative to the largest |weight|
DAMPING = 0.05  # added to the diagonal of a second moment, relative to its mean
SWEEPS = 5  # most passes of coordinate descent


@dataclass(frozen=True, eq=False)
class Codes:
    """Integers and the grid that turns them back into weights.

    Parameters
    ----------
    symbols : Tensor
        int32, shaped like the weight; 0 stands for a weight of exactly zero.
    grid : Tensor
        float32 [k], each value finite and representable in float16. Positive steps, except for a
        codebook: its values, of which the first is zero.
    kind : {"uniform", "channel", "tier", "codebook"}
        How symbols and grid combine, see Notes.
    tiers : Tensor, optional
        uint8, shaped like the weight, values below k; with kind "tier" only.

    Raises
    ------
    ValueError
        For a shape, dtype or value that breaks one of these conditions.

    Notes
    -----
    With s the symbols and g the grid, the decoded weight is
    ``s · g[0]`` (uniform, k = 1), ``s · g[i]`` for output channel i = first index (channel,
    k = number of output channels), ``s · g[tiers]`` (tier), ``g[s]`` (codebook).
    """

    symbols: Tensor
    grid: Tensor
    kind: str
    tiers: Tensor | None = None

    def __post_init__(self):
        for name in ("symbols", "grid", "tiers"):
            if (tensor := getattr(self, name)) is not None:
                object.__setattr__(self, name, tensor.detach().cpu().contiguous())
        symbols, grid, tiers = self.symbols, self.grid, self.tiers
        _check(self.kind in KINDS, f"kind {self.kind!r} is none of {', '.join(KINDS)}")
        _check(symbols.dtype == torch.int32, f"symbols must be int32, not {symbols.dtype}")
        _check(grid.dtype == torch.float32, f"grid must be float32, not {grid.dtype}")
        _check(grid.ndim == 1 and len(grid) > 0, f"grid must be [k], not {list(grid.shape)}")
        _check(bool(grid.isfinite().all()), "grid holds values that are not finite")
        _check(torch.equal(grid, grid.half().float()), "grid is not representable in float16")
        _check((tiers is None) == (self.kind != "tier"), "tiers go with kind 'tier', only there")
        if self.kind == "codebook":
            _check(grid[0] == 0, "the first value of a codebook must be zero")
            _check(bool((grid[1:] != 0).all()), "a codebook holds zero once")
            inside = (symbols >= 0) & (symbols < len(grid))
            _check(bool(inside.all()), f"codebook symbols must lie in [0, {len(grid)})")
            return
        _check(bool((grid > 0).all()), "steps must be positive")
        if self.kind == "uniform":
            _check(len(grid) == 1, f"kind 'uniform' takes one step, not {len(grid)}")
        elif self.kind == "channel":
            channels = symbols.shape[0] if symbols.ndim else 0
            _check(len(grid) == channels, f"{len(grid)} steps for {channels} output channels")
        else:
            _check(tiers.dtype == torch.uint8, f"tiers must be uint8, not {tiers.dtype}")
            _check(tiers.shape == symbols.shape, "tiers must be shaped like the symbols")
            _check(not len(tiers) or int(tiers.max()) < len(grid), "a tier has no step in the grid")

    def decode(self) -> Tensor:
        """Weights, float32, shaped like the symbols; the same bits on every machine."""
        if self.kind == "codebook":
            return self.grid[self.symbols.long()]
        if self.kind == "tier":
            return self.symbols * self.grid[self.tiers.long()]
        return self.symbols * self.grid.reshape(-1, *[1] * (self.symbols.ndim - 1))


def uniform(weight: Tensor, bits: int, *, mask: Tensor | None = None,
            per_channel: bool = False) -> Codes:
    """Quantize to a symmetric uniform grid of the step with the least squared error.

    Parameters
    ----------
    weight : Tensor
        Float weights; the first dimension is the output channel.
    bits : int
        Width, 1 to 8. The symbols are the integers of [−(2^(bits−1) − 1), 2^(bits−1) − 1]; with
        one bit they are the signs −1 and 1, and only weights that are zero or masked get 0.
    mask : Tensor, optional
        bool, shaped like the weight, True = kept; the others decode to zero.
    per_channel : bool
        One step for each output channel instead of one for the tensor.

    Returns
    -------
    Codes
        Of kind "uniform" or "channel".

    Raises
    ------
    ValueError
        If the weight is not finite, the mask does not fit or the width is outside [1, 8].

    Notes
    -----
    The step is searched over clipping points, then alternated with the symbols, as in Lloyd's
    algorithm: for given symbols s the best step is Σ w s / Σ s².
    """
    weight = _kept(weight, mask)
    _check(1 <= bits <= 8, f"bits must lie in [1, 8], not {bits}")
    rows = weight.reshape(len(weight), -1) if per_channel else weight.reshape(1, -1)
    steps = _best_steps(rows, _largest(bits))
    symbols = _nearest(rows, steps[:, None], _largest(bits)).reshape(weight.shape)
    return Codes(symbols.int(), steps, "channel" if per_channel else "uniform")


def score_tiers(weight: Tensor, scores: Tensor, *, widths=(0, 2, 4, 8), shares=None,
                mask: Tensor | None = None) -> Codes:
    """Quantize weights with higher scores to more bits: k tiers by rank of score.

    Parameters
    ----------
    weight : Tensor
        Float weights.
    scores : Tensor
        Real, shaped like the weight.
    widths : sequence of int
        Bits of each tier, ascending, 0 to 8; see :func:`uniform`. Width 0 removes the weight.
    shares : sequence of float, optional
        Share of the kept weights in each tier, lowest scores first, summing to one; equal shares
        by default. Shares counted from a ranking of all layers give tiers of the whole network.
    mask : Tensor, optional
        bool, shaped like the weight, True = kept; the others are put in tier 0 as zeros.

    Returns
    -------
    Codes
        Of kind "tier". Each tier has the step of least squared error.

    Raises
    ------
    ValueError
        If an input is not finite, shapes differ, widths or shares are unusable.

    Notes
    -----
    Tier t holds the ranks from round(n·(p_0 + … + p_{t−1})) to round(n·(p_0 + … + p_t)) of the n
    kept weights; equal scores are ranked by position, the later ones higher.

    References
    ----------
    Soroush, Raji, Ghavami, arXiv:2507.05286, abstract: the higher a weight's score, the more bits
    it gets. The number of tiers, their widths and shares are our reading.
    """
    kept = _mask_like(weight, mask)
    weight, widths = _kept(weight, mask), list(widths)
    shares = [1 / len(widths)] * len(widths) if shares is None else list(shares)
    _check(scores.shape == weight.shape, f"scores are {list(scores.shape)}, the weight is "
           f"{list(weight.shape)}")
    _check(not scores.isnan().any(), "scores hold NaN")
    _check(widths == sorted(widths) and widths[0] >= 0 and widths[-1] <= 8,
           f"widths must ascend within [0, 8], not {widths}")
    _check(len(shares) == len(widths) and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6,
           f"{len(widths)} widths take as many shares that sum to one, not {shares}")
    places = kept.reshape(-1).nonzero().squeeze(1)
    order = places[scores.detach().cpu().reshape(-1)[places].argsort(stable=True)]
    ends = [round(len(order) * share) for share in np.cumsum(shares)[:-1]] + [len(order)]
    flat, tiers = weight.reshape(-1), torch.zeros(weight.numel(), dtype=torch.uint8)
    symbols, steps = torch.zeros(weight.numel(), dtype=torch.int32), torch.ones(len(widths))
    for tier, members in enumerate(torch.tensor_split(order, ends[:-1])):
        tiers[members] = tier
        if widths[tier] and len(members):
            top = _largest(widths[tier])
            steps[tier] = _best_steps(flat[None, members], top)
            symbols[members] = _nearest(flat[members], steps[tier], top).int()
    return Codes(symbols.reshape(weight.shape), steps, "tier", tiers.reshape(weight.shape))


def kmeans(weight: Tensor, bits: int, *, mask: Tensor | None = None,
           importance: Tensor | None = None) -> Codes:
    """Share weights: a codebook by k-means, plain or weighted by importance.

    Parameters
    ----------
    weight : Tensor
        Float weights.
    bits : int
        Width, 1 to 8: at most 2^bits values besides zero.
    mask : Tensor, optional
        bool, shaped like the weight, True = kept; the others decode to zero.
    importance : Tensor, optional
        Non-negative, shaped like the weight: what a squared error of each weight costs.

    Returns
    -------
    Codes
        Of kind "codebook"; the values ascend after the zero in front. Kept weights go to the
        nearest value, which may be the zero.

    Raises
    ------
    ValueError
        If an input is not finite or does not fit, or the width is outside [1, 8].

    Notes
    -----
    Lloyd's algorithm minimises Σ_i h_i (w_i − c_{s_i})² with one value held at zero, started at
    the best uniform levels, so that no randomness enters. More than 2^16 different weights
    are clustered as 2^14 bins, each at its weighted mean.

    References
    ----------
    Han, Mao, Dally: Deep Compression, ICLR 2016, eq. 2, section 3 (linear initialisation).
    Sabih, Hannig, Teich, arXiv:2008.09072: centroids weighted by DeepLIFT importance; that the
    importance is the weight of the squared error is our reading.
    """
    kept, weight = _mask_like(weight, mask), _kept(weight, mask)
    _check(1 <= bits <= 8, f"bits must lie in [1, 8], not {bits}")
    cost = torch.ones_like(weight) if importance is None else importance.detach().float().cpu()
    _check(cost.shape == weight.shape, f"importance is {list(cost.shape)}, the weight is "
           f"{list(weight.shape)}")
    _check(bool((cost >= 0).all() & cost.isfinite().all()), "importance is negative or not finite")
    cost = cost + 1e-6 * cost.mean() if cost.any() else torch.ones_like(weight)
    points, masses = _histogram(weight[kept].double(), cost[kept].double())
    top = 2 ** (bits - 1)
    levels = torch.arange(-top, top + 1) * _best_steps(weight.reshape(1, -1), top).double()
    few = points.count_nonzero() <= 2 * top
    levels = (points if few else _lloyd(points, masses, levels)).half().float()
    values = levels[levels != 0].unique()
    grid = torch.cat([torch.zeros(1), values])
    ascending, order = grid.sort()
    nearest = torch.bucketize(weight, (ascending[1:] + ascending[:-1]) / 2)
    return Codes(order[nearest].int() * kept, grid, "codebook")


def layer_widths(importance: dict[str, float], numel: dict[str, int], mean_bits: float,
                 choices=(2, 3, 4, 5, 6, 8)) -> dict[str, int]:
    """Choose one integer width for each layer by importance.

    Parameters
    ----------
    importance : dict of float
        Non-negative, what a squared error of one of the layer's weights costs.
    numel : dict of int
        Number of weights of the same layers.
    mean_bits : float
        Most bits a weight on average over the network.
    choices : sequence of int
        Permitted widths.

    Returns
    -------
    dict of int
        A width for each layer, Σ widths·numel ≤ mean_bits·Σ numel.

    Raises
    ------
    ValueError
        If the names differ, an importance is negative or not finite, or even the least widths
        exceed the mean.

    Notes
    -----
    A layer of importance h at b bits costs h·4^−b a weight. From the least width on, the widening
    that spares most a bit, h (4^−b − 4^−b') / (b' − b), is carried out as long as it fits; a layer
    whose next widening does not fit any more stays.

    References
    ----------
    Shoham, Gersho: Efficient bit allocation for an arbitrary set of quantizers, IEEE TASSP 1988.
    Sabih, Hannig, Teich, arXiv:2008.09072: integer widths for layers by importance; the rule is
    not public to us, this one is our reading.
    """
    widths = sorted(choices)
    _check(importance.keys() == numel.keys(), "importance and numel must name the same layers")
    for name, value in importance.items():
        _check(0 <= value < math.inf, f"importance of {name!r} is {value}")
    left = math.floor(mean_bits * sum(numel.values()) + 1e-6) - widths[0] * sum(numel.values())
    _check(left >= 0, f"a mean of {mean_bits} bits is below the least width, {widths[0]}")
    gains = [(-float(value) * (4.0**-low - 4.0**-high) / (high - low), low, order, name, high)
             for order, (name, value) in enumerate(importance.items())
             for low, high in zip(widths, widths[1:], strict=False)]
    chosen = dict.fromkeys(importance, widths[0])
    for _, low, _, name, high in sorted(gains):
        if chosen[name] == low and (high - low) * numel[name] <= left:
            left -= (high - low) * numel[name]
            chosen[name] = high
    return chosen


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
    weight = _kept(weight, None)
    moment, units, _ = _problem(weight, second_moment, unit_weight)
    return _rd_step(weight, *_triangular(moment), units, lam)


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
    kept, weight = _mask_like(weight, mask), _kept(weight, None)
    moment, units, order = _problem(weight, second_moment, unit_weight)
    factor, moment, damping = _triangular(moment)
    step = _rd_step(weight, factor, moment, damping, units, lam) if step is None else step
    _check(0 < step < math.inf, f"the step must be positive, not {step}")
    _check(0 <= lam < math.inf, f"lam must not be negative, not {lam}")
    step = float(_storable(torch.tensor(step)))
    top = math.ceil(float(weight.abs().max()) / step) + 1
    _check(top < 2**15, f"step {step} is too fine: it takes symbols up to {top}")
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
    _check(moment.ndim == 3 and moment.shape[1:] == (inputs, inputs)
           and len(weight) % len(moment) == 0, f"second_moment is {list(second_moment.shape)}, "
           f"the weight {list(weight.shape)} has {inputs} inputs a unit")
    _check(bool(moment.isfinite().all()), "second_moment holds values that are not finite")
    units = torch.ones(len(weight)) if unit_weight is None else unit_weight.detach().float().cpu()
    _check(units.shape == weight.shape[:1], f"unit_weight is {list(units.shape)} for "
           f"{len(weight)} units")
    _check(bool((units >= 0).all() & units.isfinite().all()),
           "unit_weight is negative or not finite")
    order = moment.diagonal(dim1=1, dim2=2).mean(0).argsort(descending=True, stable=True)
    return moment[:, order][:, :, order], units, order


def _triangular(moment):
    """Upper triangular M with M Mᵀ = H, the damped H, both [groups, d, d], and the damping."""
    damping = (DAMPING * moment.diagonal(dim1=1, dim2=2).mean(1)).clamp(min=1e-30)[:, None]
    damped = moment + torch.diag_embed(damping.expand(moment.shape[:2]))
    factor, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
    _check(not failed.any(), "second_moment is not positive semidefinite")
    return factor.flip(1, 2), damped, damping


def _rd_step(weight, factor, moment, damping, units, lam):
    _check(0 < lam < math.inf, f"lam must be positive to derive a step, not {lam}")
    energy = factor.diagonal(dim1=1, dim2=2).square() - damping
    cost = float((energy.mean(1) * units.reshape(len(energy), -1).mean(1)).mean())
    largest = float(weight.abs().max()) or 1.0
    step = math.sqrt(6 * lam / (cost * math.log(2))) if cost > 0 else math.inf
    return float(_storable(torch.tensor(min(max(step, largest / 2**14), 2.01 * largest))))


def _code_lengths(symbols, top):
    """Bits [2·top + 1] of the symbols −top … top by their present distribution, smoothed."""
    counts = torch.bincount((symbols + top).long().flatten(), minlength=2 * top + 1) + 0.1
    return -(counts / counts.sum()).log2().float()


def _cheapest(target, damage, bits):
    """Symbols of least damage · (target − s)² + bits, among the nearest, the next and zero."""
    top = len(bits) // 2
    best = target.round().clamp_(-top, top)
    cost = damage * (target - best).square() + bits[(best + top).long()]
    for trial in (best - best.sign(), torch.zeros_like(best)):
        other = damage * (target - trial).square() + bits[(trial + top).long()]
        best, cost = torch.where(other < cost, trial, best), torch.minimum(other, cost)
    return best


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


def _lloyd(points, masses, levels):
    """Ascending levels [k] of least weighted squared error for points [n]; level zero stays."""
    fixed = levels == 0
    for _ in range(100):
        place = torch.bucketize(points, (levels[1:] + levels[:-1]) / 2)
        total = torch.bincount(place, masses, len(levels))
        means = torch.bincount(place, masses * points, len(levels)) / total
        means = torch.where(fixed | (total == 0), levels, means)
        if torch.equal(means, levels):
            break
        levels = means
    return levels


def _histogram(values, masses):
    """Distinct values with their masses; many are merged to bins at their weighted means."""
    points, place = values.unique(return_inverse=True)
    if len(points) > 2**16:
        low, high = points[0], points[-1]
        place = ((values - low) / (high - low) * (2**14 - 1)).round().long()
    total = torch.bincount(place, masses)
    points = torch.bincount(place, masses * values)[total > 0] / total[total > 0]
    return points, total[total > 0]


def _largest(bits):
    """Largest symbol of a width; 0 stands for the binary grid of signs."""
    return 2 ** (bits - 1) - 1


def _best_steps(rows, top):
    """Storable steps [r] of least squared error for rows of weights [r, n], symbols up to top."""
    largest = rows.abs().amax(1, keepdim=True)
    best, error = largest, torch.full_like(largest, math.inf)
    for clip in CLIPS:
        step = _storable(largest * clip / max(1, top))
        trial = (rows - step * _nearest(rows, step, top)).square().sum(1, keepdim=True)
        best, error = torch.where(trial < error, step, best), torch.minimum(trial, error)
    for _ in range(5):
        symbols = _nearest(rows, best, top)
        energy = symbols.square().sum(1, keepdim=True)
        step = _storable((rows * symbols).sum(1, keepdim=True) / energy.clamp(min=1))
        best = torch.where(energy > 0, step, best)
    return torch.where(largest > 0, best, 1).squeeze(1)


def _nearest(weight, step, top):
    """Nearest symbols up to top in magnitude, as floats."""
    return (weight / step).round().clamp(-top, top) if top else weight.sign()


def _storable(step):
    """Round positive steps to float16, away from its zero and infinity."""
    return step.clamp(2.0**-24, 65504.0).half().float()


def _mask_like(weight, mask):
    if mask is None:
        return torch.ones(weight.shape, dtype=torch.bool)
    _check(mask.dtype == torch.bool, f"the mask must be bool, not {mask.dtype}")
    _check(mask.shape == weight.shape, f"the mask is {list(mask.shape)}, its weight "
           f"{list(weight.shape)}")
    return mask.cpu()


def _kept(weight, mask):
    """The weight as float32 on the CPU, masked weights zero."""
    weight = weight.detach().float().cpu()
    _check(bool(weight.isfinite().all()), "the weight holds values that are not finite")
    return weight * _mask_like(weight, mask)


def _check(condition, message):
    if not condition:
        raise ValueError(message)
