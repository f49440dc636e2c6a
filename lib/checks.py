"""What the notebooks show about relevance: conservation, agreement, how many images it takes."""

import copy

import pandas as pd
import torch
from torch import Tensor, nn
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus, SpecialFirstLayerMapComposite
from zennit.rules import Epsilon

from lib.data import sample
from lib.models import fold_batchnorm
from lib.plots import spearman
from lib.relevance import Rule, input_relevance, weight_relevance


def conservation(model: nn.Module, images: Tensor, labels: Tensor, zero_bias: bool) -> pd.DataFrame:
    """Relevance of all weights of each layer, as a share of the logits sent back.

    Parameters
    ----------
    model : nn.Module
        A chain of layers (with branches, a layer sees a part of the relevance only).
    images, labels : Tensor
        Reference images [N, ...] and labels [N].
    zero_bias : bool
        Set all biases to zero first, on a copy, BatchNorm folded.

    Returns
    -------
    DataFrame
        layer, share, biases; float64 inside.
    """
    chain = copy.deepcopy(fold_batchnorm(model)).double()
    if zero_bias:
        for name, parameter in chain.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
    with torch.no_grad():
        logits = chain(images.double())[torch.arange(len(labels)), labels].sum()
    scores = weight_relevance(chain, images.double(), labels)
    label = "set to zero" if zero_bias else "as trained"
    return pd.DataFrame(
        [{"layer": k, "share": float(s.sum() / logits), "biases": label} for k, s in scores.items()]
    )


def against_zennit(model: nn.Module, images: Tensor, labels: Tensor, rule: Rule | str) -> float:
    """Largest difference of input relevance from zennit's, relative to its largest value.

    Parameters
    ----------
    model : nn.Module
        A network whose activations and sums are modules.
    images, labels : Tensor
        [N, ...] and [N].
    rule : Rule or str
        ``Rule("epsilon", epsilon=...)`` or ``"epsilon-plus"``.

    Returns
    -------
    float
        Relative maximum difference, computed in float64.
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

    Parameters
    ----------
    model : nn.Module
        The network.
    train : tuple of Tensor
        Images and labels to draw from.
    counts : list of int
        Images of each class, ascending; the last is what the others are compared with, on images
        that no draw holds.
    case : Case
        For the columns dataset and model.
    draws : int
        Independent draws of the reference images.

    Returns
    -------
    DataFrame
        dataset, model, seed (draw), knob and "images per class" (the count), scores (the
        aggregate), rank correlation.
    """
    rows = []
    for aggregate in ("sum", "abs", "rms"):

        def score(count: int, seed: int, aggregate: str = aggregate) -> dict[str, Tensor]:
            return weight_relevance(model, *sample(*train, count, seed), aggregate=aggregate)

        full = score(counts[-1], draws)
        for draw in range(draws):
            for count in counts[:-1]:
                correlation = spearman([score(count, draw), full])[0, 1]
                rows.append(
                    {
                        "dataset": case.dataset,
                        "model": case.model,
                        "seed": draw,
                        "knob": count,
                        "images per class": count,
                        "scores": aggregate,
                        "rank correlation": correlation,
                    }
                )
    return pd.DataFrame(rows)


def sign_agreement(study) -> pd.DataFrame:
    """How far the sign of a score is the sign of its weight, and how many scores are <= 0.

    Parameters
    ----------
    study : Study
        Its cases are scored at its reference images.

    Returns
    -------
    DataFrame
        dataset, model, start, share of scores <= 0, share of negative weights with score <= 0
        and of positive weights with score > 0 (all in percent, means over seeds).
    """
    rows = []
    for case in study.cases:
        model = study.base(case)
        folded = fold_batchnorm(model)
        for start in ("target", "contrastive", "softmax-gradient"):
            scores = weight_relevance(model, *study.references(case), start=start)
            score = torch.cat([s.flatten() for s in scores.values()])
            weight = torch.cat([folded.get_parameter(name).flatten() for name in scores])
            rows.append(
                {
                    "dataset": case.dataset,
                    "model": case.model,
                    "start": start,
                    "score <= 0": _percent(score <= 0),
                    "of negative weights, score <= 0": _percent(score[weight < 0] <= 0),
                    "of positive weights, score > 0": _percent(score[weight > 0] > 0),
                }
            )
    table = pd.DataFrame(rows)
    return table.groupby(["dataset", "model", "start"], sort=False).mean().reset_index()


def _percent(found: Tensor) -> float:
    return 100 * float(found.float().mean())
