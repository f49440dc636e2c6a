"""What the notebooks show about relevance: conservation, agreement, what it foretells."""

import copy

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus, SpecialFirstLayerMapComposite
from zennit.rules import Epsilon

from lib.fold import fold_batchnorm
from lib.moments import input_moments
from lib.quantize import energy, uniform
from lib.relevance import Rule, input_relevance, weight_relevance
from lib.score import criterion

from .data import sample, split


def against_zennit(model: nn.Module, images: Tensor, labels: Tensor, rule: Rule | str) -> float:
    """Largest difference of input relevance from zennit's, relative to its largest value.

    The rule is ``Rule("epsilon", epsilon=...)`` or ``"epsilon-plus"``; the network's activations
    and sums are modules; images [N, ...] and labels [N]. Computed in float64.
    """
    network, images = copy.deepcopy(fold_batchnorm(model)).double(), images.double()
    ours = input_relevance(network, images, labels, rule=rule)
    if rule == "epsilon-plus":
        composite = EpsilonPlus()
    else:
        composite = SpecialFirstLayerMapComposite(
            [(nn.Linear | nn.Conv2d, Epsilon(epsilon=rule.epsilon))], first_map=[]
        )
    with torch.no_grad():
        logits = network(images)
    start = logits * nn.functional.one_hot(labels, logits.shape[1])
    with Gradient(model=network, composite=composite) as attributor:
        _, theirs = attributor(images, start)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def references_needed(
    model: nn.Module, train: tuple[Tensor, Tensor], counts: list[int], case, draws: int = 3
) -> pd.DataFrame:
    """Rank correlation of scores from few reference images with those from many.

    ``train`` holds the images and labels to draw from, ``counts`` ascending numbers of images of
    each class, of which the last is what the others are compared with, on images that no draw
    holds. Columns: dataset, model, seed (the draw), knob and "images per class" (the count), scores
    (the aggregate), rank correlation.
    """
    rows = []
    for aggregate in ("sum", "abs", "rms"):

        def score(count: int, seed: int, aggregate: str = aggregate) -> dict[str, Tensor]:
            return weight_relevance(model, *sample(*train, count, seed), aggregate=aggregate)

        full = score(counts[-1], draws)
        for draw in range(draws):
            for count in counts[:-1]:
                correlation = rank_correlation([score(count, draw), full])[0, 1]
                rows.append((case.dataset, case.model, draw, count, count, aggregate, correlation))
    names = ["dataset", "model", "seed", "knob", "images per class", "scores", "rank correlation"]
    return pd.DataFrame(rows, columns=names)


def rank_correlation(scores: list[dict[str, Tensor]]) -> np.ndarray:
    """Spearman's correlations [K, K] of K scores of the same weights; ties share their rank."""
    columns = [torch.cat([value.flatten() for value in score.values()]) for score in scores]
    return pd.DataFrame(torch.stack(columns, 1).numpy()).corr("spearman").to_numpy()


def sign_agreement(study) -> pd.DataFrame:
    """How far the sign of a score is the sign of its weight, and how many scores are <= 0.

    Cases are scored at the study's reference images. Columns: dataset, model, start, and in
    percent, means over seeds, the share of scores <= 0, of negative weights with score <= 0 and of
    positive weights with score > 0.
    """
    rows = []
    for case in study.cases:
        model = study.base(case)
        folded = fold_batchnorm(model)
        for start in ("target", "contrastive", "softmax-gradient"):
            scores = weight_relevance(model, *study.references(case), start=start)
            score = torch.cat([s.flatten() for s in scores.values()])
            weight = torch.cat([folded.get_parameter(name).flatten() for name in scores])
            found = {
                "score <= 0": score <= 0,
                "of negative weights, score <= 0": score[weight < 0] <= 0,
                "of positive weights, score > 0": score[weight > 0] > 0,
            }
            shares = {what: 100 * float(each.float().mean()) for what, each in found.items()}
            rows.append({"dataset": case.dataset, "model": case.model, "start": start} | shares)
    return _over_seeds(rows, ["dataset", "model", "start"])


def harm_foretold(study, criteria: list[str], bits: int = 3, groups: int = 4) -> pd.DataFrame:
    """How well the weights of the units' errors foretell what rounding those units does.

    The units of each layer are ordered by the first criterion and cut into groups. The incoming
    weights of one group at a time are rounded; that changes the network's predictions.

    Cases are weighed at the study's reference images and tried on 20 images of each class of the
    validation split. Columns: dataset, model, groups (in all layers), and for each criterion
    (``lib.score.Criterion.units``) Spearman's correlation, over the groups, mean over seeds, of the
    damage that rate-distortion reckons with (``lib.quantize.energy`` of the rounding error) and the
    Kullback-Leibler divergence of the predictions.
    """
    rows = []
    for case in study.cases:
        network, references = fold_batchnorm(study.base(case)).eval(), study.references(case)
        units = {name: criterion(name).units(network, *references) for name in criteria}
        moments = input_moments(network, references[0], centered=True)
        images, _ = sample(*split(case.dataset, "val"), 20, seed=0)
        whole = _log_predictions(network, images)
        found = []
        for layer, moment in moments.items():
            weight = network.get_parameter(layer).data
            trained = weight.clone()
            error = uniform(trained, bits).decode() - trained
            for group in units[criteria[0]][layer].argsort().tensor_split(groups):
                part = torch.zeros_like(error).index_copy(0, group, error[group])
                weight.copy_(trained + part)
                now = _log_predictions(network, images)
                weight.copy_(trained)
                harm = nn.functional.kl_div(now, whole, log_target=True, reduction="batchmean")
                damages = {name: energy(part, moment, units[name][layer]) for name in criteria}
                found.append({"harm": float(harm)} | damages)
        ranks = pd.DataFrame(found).corr("spearman")["harm"].drop("harm")
        where = {"dataset": case.dataset, "model": case.model, "groups": len(found)}
        rows.append(where | ranks.to_dict())
    return _over_seeds(rows, ["dataset", "model"])


@torch.no_grad()
def _log_predictions(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([network(batch) for batch in images.split(100)]).log_softmax(1)


def _over_seeds(rows: list[dict], by: list[str]) -> pd.DataFrame:
    return pd.DataFrame(rows).groupby(by, sort=False, as_index=False).mean()
