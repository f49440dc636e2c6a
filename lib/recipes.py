"""The one pipeline: a recipe turns a network and reference images into a compressed file."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lib import prune, quantize, reconstruct
from lib.allocate import criterion_of, tier_shares, unit_weights
from lib.codec import Compressed, Constant
from lib.criteria import CRITERIA
from lib.models import batchnorm_pairs, fold_batchnorm
from lib.quantize import Codes
from lib.relevance import scored_weights
from lib.train import OPTIMISERS, Batches, evaluate, finetune

__all__ = [
    "RECIPES", "Compressed", "Prepared", "Recipe", "compress", "encode", "prepare", "remove",
]  # fmt: skip

_CHOICES = {
    "pruning": ("none", "nonpositive", "top", "filters"),
    "quantizer": ("tiers", "uniform", "layers", "rate-distortion"),
    "scope": ("global", "layer"),
    "optimiser": tuple(OPTIMISERS),
}
WIDTHS = (1, 2, 3, 4, 5, 6, 8)
KNOBS = {"tiers": "bits", "uniform": "bits", "layers": "bits", "rate-distortion": "lam"}
KNOB_VALUES = {
    "tiers": [8 - step / 10 for step in range(61)],
    "uniform": [8, 7, 6, 5, 4, 3, 2],
    "layers": [8 - step / 10 for step in range(71)],
    "rate-distortion": [10 ** (step / 20 - 12) for step in range(261)],
}
"""Settings of each quantizer's knob that a budget is searched over, largest file first."""
CLOSE = 0.03  # share of a budget of bytes that may be left over


@dataclass(frozen=True)
class Recipe:
    """One row of the comparison: criterion, pruning rule, precision and repair.

    Attributes
    ----------
    criterion : str
        A key of ``CRITERIA``: the scores that rank weights.
    pruning : str
        ``none``; ``nonpositive``: remove scores <= 0; ``top``: keep the share ``density`` with
        the highest scores; ``filters``: keep the share ``density`` of each layer's filters with
        the highest summed score, and of the other layers' weights.
    density : float
        Share kept by ``top`` and ``filters``, in (0, 1].
    scope : str
        ``top`` only: rank the weights of all layers together (``global``) or of each layer
        (``layer``).
    rounds : int
        Removal in this many rounds, scored anew before each.
    layerwise : bool
        In each round, one layer after the other, scored anew and repaired in between.
    fraction : float
        ``nonpositive`` only: share of the non-positive weights that a round removes, those
        nearest zero first. One round at 1 is the literal rule.
    refit : bool
        After each removal, refit the kept weights to the dense layers' outputs (no labels).
    renormalise : bool
        After each removal, give every unit the mean and deviation that it had: what estimating
        BatchNorm's statistics anew does (no labels). Before the refit, if both are asked for.
    finetune : int
        Steps with labels after the last round; needs ``train``.
    optimiser : str
        Of these steps: a key of ``lib.train.OPTIMISERS``.
    quantizer : str
        ``tiers``: k classes of weights by score, more bits for higher scores; ``uniform``: the
        same bits for all; ``layers``: one integer width per layer by importance, k-means weight
        sharing; ``rate-distortion``: minimise relevance-weighted damage + lam * bits.
    bits : float
        Mean width of ``tiers``, ``uniform`` and ``layers``.
    widths : tuple of int
        Bits of the ``tiers``, ascending, the first 0: that of removed weights.
    lam : float
        Price of a bit for ``rate-distortion``: the damage that saving one may do, in units of
        what removing all weights would do, divided by their number. So it means about the same
        for every network: near 0.01 weights take two bits, at 10 hardly any is left.
    precision : str
        What decides the bits: a criterion; with ``rate-distortion`` also ``alike``,
        ``root:<criterion>`` or ``shuffled:<criterion>`` (see ``lib.allocate``); empty: the same
        as ``criterion``.
    """

    criterion: str = "lrp-epsilon"
    pruning: str = "nonpositive"
    density: float = 0.5
    scope: str = "global"
    rounds: int = 1
    fraction: float = 1.0
    layerwise: bool = False
    refit: bool = False
    renormalise: bool = False
    finetune: int = 0
    optimiser: str = "adam"
    quantizer: str = "tiers"
    bits: float = 4.0
    widths: tuple[int, ...] = (0, 2, 4, 8)
    lam: float = 0.01
    precision: str = ""

    def __post_init__(self):
        by_units = self.quantizer == "rate-distortion"
        for name in (self.criterion, criterion_of(self.decides) if by_units else self.decides):
            if not (by_units and name == "alike"):
                CRITERIA[name]  # raises for an unknown name, and lists the known
        for field, known in _CHOICES.items():
            if getattr(self, field) not in known:
                raise ValueError(
                    f"unknown {field} {getattr(self, field)!r}; known: {', '.join(known)}"
                )
        if self.rounds < 1 or not 0 < self.density <= 1:
            raise ValueError("rounds must be at least 1 and density in (0, 1]")
        if self.widths[:1] != (0,) or list(self.widths) != sorted({*self.widths}):
            raise ValueError(f"widths must ascend from 0, not {self.widths}")

    @property
    def decides(self) -> str:
        """The criterion that decides the bits."""
        return self.precision or self.criterion

    @property
    def removal(self) -> "Recipe":
        """What of it decides which weights go and how the others are repaired."""
        return replace(self, quantizer="uniform", bits=Recipe.bits, precision="").plain

    @property
    def plain(self) -> "Recipe":
        """The same recipe, with all that it makes no use of at its default."""
        unused = {"bits", "widths", "lam"} - {KNOBS[self.quantizer]}
        unused -= {"widths"} if self.quantizer == "tiers" else set()
        unused |= {"optimiser"} if not self.finetune else set()
        unused |= {"density"} if self.pruning not in ("top", "filters") else set()
        unused |= {"scope"} if self.pruning != "top" else set()
        unused |= {"fraction"} if self.pruning != "nonpositive" else set()
        decides = self.decides
        if self.pruning == "none":
            unused |= {"criterion", "rounds", "layerwise", "refit", "renormalise"}
        plain = replace(self, **{name: getattr(Recipe, name) for name in unused})
        needed = self.quantizer != "uniform" and decides != plain.criterion
        return replace(plain, precision=decides if needed else "")


_OURS = Recipe(
    criterion="lrp-epsilon/contrastive",
    rounds=4,
    fraction=0.5,
    refit=True,
    quantizer="rate-distortion",
)
_BASELINE = Recipe(criterion="deeplift", pruning="filters", density=0.8, quantizer="layers")

RECIPES: dict[str, Recipe] = {
    "uniform": Recipe(criterion="magnitude", pruning="none", quantizer="uniform"),
    "magnitude": Recipe(criterion="magnitude", pruning="top", quantizer="uniform"),
    "lrp-paper": Recipe(),
    "lrp-paper-finetuned": Recipe(finetune=300),
    "random-paper": Recipe(criterion="random"),
    "reversed-paper": Recipe(criterion="reversed:lrp-epsilon"),
    "deeplift-baseline": _BASELINE,
    "deeplift-baseline-finetuned": replace(_BASELINE, finetune=300),
    "lrp-gradual": replace(_OURS, quantizer="tiers"),
    "lrp-rd": replace(_OURS, pruning="none", rounds=1),
    "lrp-gradual-rd": _OURS,
}


@dataclass
class Prepared:
    """A network pruned and repaired, with all that its encoding needs; see ``prepare``.

    Attributes
    ----------
    model : nn.Module
        The user's model, as given.
    working : nn.Module
        Its folded copy after pruning, refitting and fine-tuning.
    masks : dict of str to Tensor
        bool, True = kept; keyed by weight name.
    scores : dict of str to Tensor
        Scores that decide the bits (absent for ``alike``), of the working network.
    moments : dict of str to Tensor
        Covariances of the layers' inputs, whose means are left to the biases; only for
        ``rate-distortion``.
    units : dict of str to Tensor
        Weight of each output unit's squared error; only for ``rate-distortion``.
    damage : float
        What removing all of the working network's weights would do, divided by their number;
        only for ``rate-distortion``.
    images : Tensor
        The reference images.
    """

    model: nn.Module
    working: nn.Module
    masks: dict[str, Tensor]
    scores: dict[str, Tensor]
    moments: dict[str, Tensor]
    units: dict[str, Tensor]
    damage: float
    images: Tensor


def _fold_scales(model: nn.Module, folded: nn.Module) -> dict[str, Tensor]:
    """Factors by which folding multiplied each weight; one where that is not defined."""
    scales = {}
    for name in scored_weights(folded):
        before, after = model.get_parameter(name).detach(), folded.get_parameter(name).detach()
        scale = (after / before).abs()
        scales[name] = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
    return scales


def _score(name, working, images, labels, scales) -> dict[str, Tensor]:
    scores = CRITERIA[name](working, images, labels)
    if name.removeprefix("reversed:") == "magnitude":
        # Folding multiplied each row by its BatchNorm's gain; weights are ranked as trained.
        return {key: score / scales[key] for key, score in scores.items()}
    return scores


def _next_masks(recipe: Recipe, scores, masks, round_: int) -> dict[str, Tensor]:
    if recipe.pruning == "nonpositive":
        return prune.nonpositive_nearest(scores, recipe.fraction, mask=masks)
    density = recipe.density ** ((round_ + 1) / recipe.rounds)
    scores = {name: score.masked_fill(~masks[name], -math.inf) for name, score in scores.items()}
    if recipe.pruning == "top":
        return prune.keep_top(scores, density, scope=recipe.scope)
    flat = {name: score for name, score in scores.items() if score.ndim == 2}
    unstructured = prune.keep_top(flat, density) if flat else {}
    return prune.intersect(prune.filters(scores, density, scope="layer"), unstructured)


def remove(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    train: Batches | None = None,
    seed: int = 0,
) -> tuple[nn.Module, prune.Mask]:
    """Score and prune a network, refit and fine-tune what is left.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    images, labels : Tensor
        Reference images [N, ...] and int64 labels [N], from the training split.
    recipe : Recipe
        What to do; how weights are stored does not matter here.
    train : tuple of Tensor, or iterable of batches, optional
        Training data, for recipes that fine-tune.
    seed : int
        Of the order in fine-tuning.

    Returns
    -------
    working : nn.Module
        A copy with BatchNorm folded; removed weights are zero.
    masks : dict of str to Tensor
        bool, True = kept; keyed by weight name.

    Raises
    ------
    ValueError
        A recipe that fine-tunes without ``train``; unusable images, labels or model (see
        ``lib.relevance``).
    """
    if recipe.finetune and train is None:
        raise ValueError("this recipe fine-tunes: give it train=(images, labels) or a DataLoader")
    dense = fold_batchnorm(model)
    scales = _fold_scales(model, dense)
    masks = {name: torch.ones_like(scale, dtype=torch.bool) for name, scale in scales.items()}
    working = copy.deepcopy(dense)
    for round_ in range(recipe.rounds if recipe.pruning != "none" else 0):
        for part in [[name] for name in masks] if recipe.layerwise else [list(masks)]:
            scores = _score(recipe.criterion, working, images, labels, scales)
            removed = _next_masks(recipe, scores, masks, round_)
            now = {name: removed[name] for name in part}
            masks, working = masks | now, prune.apply(working, now)
            if recipe.renormalise:
                working = reconstruct.renormalise(dense, working, now, images)
            if recipe.refit:
                working = reconstruct.refit(dense, working, now, images)
    if recipe.finetune:
        working = finetune(
            working, masks, train, steps=recipe.finetune, optimiser=recipe.optimiser, seed=seed
        )
    return working, masks


def prepare(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    train: Batches | None = None,
    seed: int = 0,
    *,
    removed: tuple[nn.Module, prune.Mask] | None = None,
) -> Prepared:
    """Do all of a recipe that does not depend on the file's size.

    Parameters
    ----------
    model, images, labels, recipe, train, seed
        As for ``remove``.
    removed : tuple, optional
        What ``remove`` gave for a recipe of the same ``removal``; computed if it is not given.

    Returns
    -------
    Prepared

    Raises
    ------
    ValueError
        As ``remove`` does.
    """
    working, masks = removed or remove(model, images, labels, recipe, train, seed)
    scores, moments, units, damage = {}, {}, {}, 0.0
    if recipe.quantizer == "rate-distortion":
        moments = reconstruct.input_moments(working, images, centered=True)
        units = unit_weights(recipe.decides, working, images, labels)
        damage = _damage(working, masks.keys() & moments.keys(), moments, units)
    elif recipe.quantizer != "uniform":
        scales = _fold_scales(model, fold_batchnorm(model))
        scores = _score(recipe.decides, working, images, labels, scales)
    return Prepared(model, working, masks, scores, moments, units, damage, images)


def _damage(working, names, moments, units) -> float:
    weights = {name: working.get_parameter(name) for name in sorted(names)}
    total = sum(quantize.energy(w, moments[n], units[n]) for n, w in weights.items())
    # A network whose outputs are all zero has no damage to measure by; any price will do.
    return total / max(1, sum(weight.numel() for weight in weights.values())) or 1.0


def _codes(prepared: Prepared, recipe: Recipe) -> dict[str, Codes]:
    weights = {name: prepared.working.get_parameter(name).detach() for name in prepared.masks}
    masks, scores = prepared.masks, prepared.scores
    if recipe.quantizer == "rate-distortion":
        return {name: _distort(prepared, recipe.lam, name, w) for name, w in weights.items()}
    if recipe.quantizer == "tiers":
        shares = tier_shares(scores, masks, recipe.widths, recipe.bits)
        return {
            n: quantize.score_tiers(
                w, scores[n], widths=recipe.widths, shares=shares[n], mask=masks[n]
            )
            for n, w in weights.items()
        }
    if recipe.quantizer == "layers":
        importance = {n: float(s.abs().mean()) for n, s in scores.items()}
        numel = {name: weight.numel() for name, weight in weights.items()}
        widths = quantize.layer_widths(importance, numel, recipe.bits, WIDTHS)
        return {n: quantize.kmeans(w, widths[n], mask=masks[n]) for n, w in weights.items()}
    return {
        name: quantize.uniform(weight, round(recipe.bits), mask=masks[name])
        for name, weight in weights.items()
    }


def _distort(prepared: Prepared, lam: float, name: str, weight: Tensor) -> Codes:
    if name not in prepared.moments:
        # Embeddings, attention and transposed convolutions: no second moment of inputs is known.
        return quantize.uniform(weight, 8, mask=prepared.masks[name])
    return quantize.rate_distortion(
        weight,
        second_moment=prepared.moments[name],
        unit_weight=prepared.units[name],
        lam=lam * prepared.damage,
        mask=prepared.masks[name],
    )


def _entries(prepared: Prepared, working: nn.Module, codes: dict[str, Codes]) -> dict:
    """Content for the user's state_dict: folded BatchNorms become neutral, biases float16."""
    state = {name: value.detach().cpu() for name, value in working.state_dict().items()}
    biases = [name.removesuffix("weight") + "bias" for name in codes]
    entries = state | codes | {name: _half(state[name]) for name in biases if name in state}
    for norm_path, layer_path in batchnorm_pairs(prepared.model).items():
        norm, shift = prepared.model.get_submodule(norm_path), entries[f"{layer_path}.bias"]
        neutral = {
            "weight": 1.0,
            "bias": shift,
            "running_mean": 0.0 if norm.affine else -shift,
            "running_var": 1.0 - norm.eps,
            "num_batches_tracked": 0,
        }
        for name, value in norm.state_dict().items():
            entries[f"{norm_path}.{name}"] = _filled(neutral[name], value)
        if prepared.model.get_submodule(layer_path).bias is not None:
            entries[f"{layer_path}.bias"] = _filled(0.0, shift)
    return {name: entries[name] for name in prepared.model.state_dict()}


def _half(values: Tensor) -> Tensor:
    halved = values.half()
    return halved if bool(halved.isfinite().all()) else values


def _filled(content: Tensor | float, like: Tensor) -> Tensor | Constant:
    if isinstance(content, Tensor):
        return content
    return Constant(torch.tensor(content, dtype=like.dtype), tuple(like.shape))


def encode(prepared: Prepared, recipe: Recipe) -> Compressed:
    """Quantize and code a prepared network.

    Parameters
    ----------
    prepared : Prepared
        From ``prepare`` with a recipe that differs at most in ``bits`` and ``lam``.
    recipe : Recipe
        The quantizer and its knob.

    Returns
    -------
    Compressed
    """
    codes = _codes(prepared, recipe)
    working = copy.deepcopy(prepared.working)
    with torch.no_grad():
        for name, code in codes.items():
            parameter = working.get_parameter(name)
            parameter.copy_(code.decode())
    corrected = reconstruct.bias_correction(prepared.working, working, prepared.images)
    return Compressed(_entries(prepared, corrected, codes))


def _most_accurate_within(most: float, at: Callable, knobs: list[float]) -> Compressed | None:
    """The largest file of at most that many bytes, or one hardly smaller.

    Sizes fall along the knobs: regula falsi on their logarithm, with the weights of Dowell and
    Jarratt (BIT 1971, "Illinois"), takes fewer encodings than bisection.
    """
    low, high, best, side = -1, len(knobs), None, 0
    above, below = 4.0, -4.0  # log of size / budget at low and high; guesses until measured
    while high - low > 1:
        middle = round(low + (high - low) * above / (above - below))
        middle = min(max(middle, low + 1), high - 1)
        candidate = at(knobs[middle])
        excess = math.log(candidate.nbytes / most)
        if excess > 0:
            low, above, below = middle, excess, below / 2 if side > 0 else below
        else:
            best, high, below, above = candidate, middle, excess, above / 2 if side < 0 else above
            if excess > -CLOSE:
                break
        side = 1 if excess > 0 else -1
    return best


def _smallest_that(fits: Callable[[Compressed], bool], at: Callable, knobs: list[float]):
    """The smallest file that fits, where larger files do too: bisection."""
    low, high, best = 0, len(knobs) - 1, None
    while low <= high:
        middle = (low + high) // 2
        candidate = at(knobs[middle])
        if fits(candidate):
            best, low = candidate, middle + 1
        else:
            high = middle - 1
    return best


def _budget(bits, ratio, max_drop, val) -> str | None:
    given = {"bits": bits, "ratio": ratio, "max_drop": max_drop}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"give one budget, not {' and '.join(given)}")
    for name, value in given.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, not {value}")
    if max_drop is not None and val is None:
        raise ValueError("max_drop is measured on validation data: give val=(images, labels)")
    return next(iter(given), None)


def compress(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: str | Recipe = "lrp-paper",
    train: Batches | None = None,
    *,
    val: tuple[Tensor, Tensor] | None = None,
    bits: float | None = None,
    ratio: float | None = None,
    max_drop: float | None = None,
    seed: int = 0,
) -> Compressed:
    """Compress a network by a recipe.

    Parameters
    ----------
    model : nn.Module
        Any feed-forward network that ``lib.relevance`` accepts; not changed.
    images, labels : Tensor
        Reference images [N, ...] and int64 labels [N], taken from the training data.
    recipe : str or Recipe
        A key of ``RECIPES``, or a recipe of your own.
    train : tuple of Tensor, or iterable of batches, optional
        Training data, for recipes that fine-tune.
    val : tuple of Tensor, optional
        Validation images and labels, for ``max_drop``.
    bits, ratio, max_drop : float, optional
        At most one budget, met by search over the recipe's knob on the size of the real file:
        a file, as large as may be or up to 3 % smaller where the knob has no steps, that takes
        at most ``bits`` per weight (all bytes of the file counted) or is at least ``ratio`` times
        smaller than the float32 ``state_dict``; or the smallest that loses at most ``max_drop``
        points of accuracy on ``val``.
    seed : int
        Of the order in fine-tuning.

    Returns
    -------
    Compressed
        ``save`` it, ``to_model`` it.

    Raises
    ------
    ValueError
        Unknown recipe (the message lists the known ones), unusable input, or a budget that
        cannot be met (the message says what can).
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
        recipe = RECIPES[recipe]
    budget = _budget(bits, ratio, max_drop, val)
    prepared = prepare(model, images, labels, recipe, train, seed)
    if budget is None:
        return encode(prepared, recipe)

    knob = KNOBS[recipe.quantizer]
    tried = []

    def at(value: float) -> Compressed:
        tried.append(encode(prepared, replace(recipe, **{knob: value})))
        return tried[-1]

    if budget == "max_drop":
        floor = evaluate(model, *val) - max_drop

        def fits(result: Compressed) -> bool:
            return evaluate(result.to_model(model), *val) >= floor

        best = _smallest_that(fits, at, KNOB_VALUES[recipe.quantizer])
    else:
        floats = sum(4 * value.numel() for value in model.state_dict().values())
        weights = sum(mask.numel() for mask in prepared.masks.values())
        most = weights * bits / 8 if budget == "bits" else floats / ratio
        best = _most_accurate_within(most, at, KNOB_VALUES[recipe.quantizer])
    if best is None:
        smallest = min(result.nbytes for result in tried)
        raise ValueError(
            f"no setting of {knob!r} meets {budget}={bits or ratio or max_drop}; the smallest "
            f"file tried has {smallest} bytes. Prune more, or ask for less"
        )
    return best
