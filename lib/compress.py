"""The one pipeline: remove -> repair -> quantize -> file, and the search for a budget.

``compress`` is all that a user needs. Its stages, each visited once, are ``remove`` (BatchNorm is
folded on entry; score, prune, repair, in rounds), ``prepare`` (what the quantizer needs, whatever
the size) and ``encode`` (codes, biases, BatchNorm unfolded).
"""

import copy
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from . import masks as masking
from . import progress as reporting
from . import repair
from .advice import (
    float_bytes,
    warn_if_ruined,
    warn_of_emptied,
    warn_of_sizes,
    warn_of_unscored,
)
from .checks import (
    check_alone,
    check_copy,
    check_logits,
    check_model,
    check_samples,
    check_scale,
    check_state,
)
from .codec import Compressed
from .codes import halved
from .finetune import Batches, accuracy, check_batches, evaluate, finetune
from .fold import fold
from .inputs import Output, copied, evaluated, probed, tensors_of, unwrapped
from .prune import Removed
from .recipe import RECIPES, Recipe
from .relevance import scored_weights
from .search import Budget, most_accurate_within, smallest_within


@dataclass(frozen=True)
class Prepared:
    """A network pruned and repaired, with all that its encoding needs."""

    removed: Removed  # the network and its masks
    details: Any  # what the recipe's quantizer computed beforehand
    images: Tensor  # the reference images


def remove(
    model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe,
    train: Batches | None = None, seed: int = 0,
) -> Removed:  # fmt: skip
    """Score and prune a network, repair and fine-tune what is left, in a copy.

    Arguments as of ``compress``; how the recipe stores weights does not matter here.

    Raises
    ------
    ValueError
        A recipe that fine-tunes without ``train``; unusable images, labels or model (see
        ``lib.relevance``).
    """
    how = recipe.repair
    if (how.finetune or recipe.store.trains) and train is None:
        raise ValueError("this recipe trains: give it train=(images, labels) or a DataLoader")
    folded = fold(model, images)
    network = copy.deepcopy(folded.network)
    masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in scored_weights(network).items()}
    if rule := recipe.remove:
        parts = [[name] for name in masks] if rule.layerwise else [list(masks)]
        for round_, part in product(range(rule.rounds), parts):
            scores = Removed(folded, network, masks).scores(rule.by, images, labels)
            kept = masking.intersect(masks, rule.masks(scores, masks, round_))
            now = {name: kept[name] for name in part}
            masks, network = masks | now, masking.apply(network, now)
            if how.renormalise:
                network = repair.renormalise(folded.network, network, now, images)
            if how.refit:
                network = repair.refit(folded.network, network, now, images)
    if train is not None and how.finetune:
        finetune(network, masks, train, steps=how.finetune, optimiser=how.optimiser, seed=seed)
        network = copied(network)  # without activations that a model may keep
    return Removed(folded, network, masks, train, seed)


def prepare(removed: Removed, images: Tensor, labels: Tensor, recipe: Recipe) -> Prepared:
    """All that the recipe's quantizer needs, wherever its knob stands."""
    return Prepared(removed, recipe.store.prepare(removed, images, labels), images)


def encode(prepared: Prepared, recipe: Recipe) -> Compressed:
    """Quantize a network, correct its biases, and unfold BatchNorm.

    It was prepared by a recipe that differs at most in its quantizer's knob.
    """
    reporting.begin({name: mask.numel() for name, mask in prepared.removed.masks.items()})
    network, codes = recipe.store.store(prepared.removed, prepared.details, prepared.images)
    folded = prepared.removed.folded
    like = tensors_of(folded.model)
    # networks in half precision were copied to float32
    state = {
        name: value.detach().cpu().to(like[name].dtype if name in like else value.dtype)
        for name, value in tensors_of(network).items()
    }
    biases = [name.removesuffix("weight") + "bias" for name in codes]
    halves = {name: halved(state[name]) for name in biases if name in state}
    owners = {id(network.get_parameter(name)): name for name in codes}
    tied = {
        name: codes[owners[id(p)]]
        for name, p in network.named_parameters(remove_duplicate=False)
        if id(p) in owners and name in state
    }
    return Compressed(folded.unfold(state | codes | tied | halves))


@torch.inference_mode(False)
def compress(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: str | Recipe = "lrp-sequential",
    train: Batches | None = None,
    *,
    val: Batches | None = None,
    bits: float | None = None,
    ratio: float | None = None,
    max_drop: float | None = None,
    seed: int = 0,
    output: Output | None = None,
    progress: bool = False,
) -> Compressed:
    """Compress a network by a recipe.

    Parameters
    ----------
    model : nn.Module
        Any feed-forward network that ``lib.relevance`` accepts; not changed. Inside of
        DataParallel or torch.compile the network itself is compressed, under its own names.
    images, labels : Tensor
        Reference images [N, ...] and int64 labels [N], taken from the training data: 20 to 50 of
        each class are wanted; with fewer, codes fit the few images alone.
    recipe : str or Recipe
        A key of ``RECIPES``, or a recipe of your own. The default is the best one without
        training; the paper's rule taken literally is ``lrp-paper``, which destroys most networks.
    train : tuple of Tensor, or iterable of batches, optional
        Training data, for recipes that fine-tune.
    val : tuple of Tensor, or iterable of batches, optional
        Validation images and labels, for ``max_drop``.
    bits, ratio, max_drop : float, optional
        At most one budget, met by search over the recipe's knob on the size of the real file:
        a file, as large as may be or up to 3 % smaller (10 % after three files) where the knob
        has no steps, that takes at most ``bits`` per weight (all bytes of the file counted) or is
        at least ``ratio`` times smaller than the float32 ``state_dict``; or the smallest that
        loses at most ``max_drop`` points of accuracy on ``val``.
    seed : int
        Of the order in fine-tuning.
    output : callable, optional
        Takes what the model returns and gives its logits: ``output=lambda o: o.logits``.
    progress : bool
        Tell on one line of stderr how many layers of which file are coded, and the time left for
        it; a budget takes several files.

    Returns
    -------
    Compressed
        ``save`` it, ``to_model`` it.

    Warns
    -----
    UserWarning
        The result loses more than ten points of accuracy on the reference images, or the model
        itself is near chance on them; layers whose weights no rule scores take more than 1 % of
        the file; the images are too few or too much alike for what a layer reads.

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
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe must be a Recipe or a name of RECIPES, not {recipe!r}")
    budget = Budget.of(bits, ratio, max_drop, val)
    check_model(model)
    model = unwrapped(model)
    check_state(model)
    check_samples(images, labels)
    check_scale(images)
    for name, data in (("train", train), ("val", val)):
        check_batches(name, data)
    if output is not None:
        model = copied(model, output)
    labels = labels.long()
    network = evaluated(copied(model))
    check_copy(model, network, images[:2])
    check_logits(probed(network, images[:2]), labels)
    check_alone(network, images)
    before = evaluate(network, images, labels)
    prepared = prepare(remove(model, images, labels, recipe, train, seed), images, labels, recipe)
    warn_of_sizes(prepared.removed)
    with reporting.showing(progress):
        best = _search(model, prepared, recipe, budget, val) if budget else encode(prepared, recipe)
    warn_of_unscored(prepared.removed, best)
    warn_of_emptied(prepared.removed, best)
    warn_if_ruined(model, best, images, labels, before)
    return best


def _search(
    model: nn.Module, prepared: Prepared, recipe: Recipe, budget: Budget, val: Batches | None
) -> Compressed:
    tried: list[float] = []

    def at(value: float) -> Compressed:
        result = encode(prepared, recipe.at(value))
        tried.append(result.nbytes)
        return result

    if val is not None and budget.kind == "max_drop":
        before, drops, store = accuracy(model, val), [], recipe.store

        def drop(result: Compressed) -> float:
            drops.append(before - accuracy(result.to_model(model), val))
            return drops[-1]

        best = smallest_within(budget.amount + 1e-9, drop, at, store.settings, store.value)
        reached = f"of the files tried the best loses {min(drops):.2f} points. Allow for that"
    else:
        floats = float_bytes(model)
        weights = sum(mask.numel() for mask in prepared.removed.masks.values())
        most = weights * budget.amount / 8 if budget.kind == "bits" else floats / budget.amount
        bits = recipe.store.expected(prepared.removed, prepared.details, prepared.images)
        best = most_accurate_within(
            most, at, recipe.store.settings, lambda value: weights / 8 * bits(value)
        )
        least = min(tried)
        met = 8 * least / weights if budget.kind == "bits" else floats / least
        reached = (
            f"the smallest file has {least} bytes, which is {budget.kind}={met:.3g}. Ask for less, "
            "or remove more weights before they are stored"
        )
    if best is None:
        raise ValueError(
            f"{budget.kind}={budget.amount:g} cannot be met by this recipe: {reached}, or take "
            "another recipe"
        )
    return best
