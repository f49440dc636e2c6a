"""Layer-wise relevance propagation down to every weight.

The relevance of a connection is activation x weight x modified gradient, so that a score for every
weight costs about one backward pass. Each file imports from those before it alone:

1. ``rules`` (how a layer shares relevance), ``operations`` (maps linear in input and weight),
   ``samples`` (where relevance starts, and the weights that are scored);
2. ``layers``: autograd functions that carry relevance, and ``Collector``, what they report to;
3. ``kinds`` (functions by name), ``factors`` (gates and normalisers), ``origins`` (what comes from
   the images alone), ``functions``, ``norms``, ``weights`` (outside of their layers), ``changes``
   (in place), ``passing`` (functions that are no layers), ``trace``: how calls are replaced;
4. ``collectors``, ``persample``: what is added up; ``saved`` (what must not change), ``moving``
   (what moves the outputs), ``collect``: the run over all samples;
5. ``deeplift``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..checks import check_samples
from ..dense import dense_layers
from ..fold import TRANSPOSED
from ..inputs import Output, UnsupportedLayerError, unwrapped
from .collect import Run, totals
from .collectors import Inputs, Units
from .rules import COMPOSITES, EPSILON, RULES, Rule, RuleLike
from .samples import AGGREGATES, STARTS, scored_weights

__all__ = [
    "AGGREGATES", "COMPOSITES", "EPSILON", "RULES", "STARTS", "Rule", "UnsupportedLayerError",
    "filter_relevance", "input_relevance", "scored_weights", "totals", "unit_sensitivity",
    "weight_relevance",
]  # fmt: skip


@torch.inference_mode(False)
@torch.enable_grad()
def weight_relevance(
    model: nn.Module, images: Tensor, labels: Tensor, *, rule: RuleLike = "epsilon",
    start: str = "target", aggregate: str = "sum", batch_size: int = 32,
    output: Output | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Relevance of every weight, aggregated over reference samples.

    Parameters
    ----------
    model : nn.Module
        Classifier that returns logits [samples, classes]; not changed, scored in evaluation mode.
        Inside of DataParallel or torch.compile the network itself is scored, under its own names.
    images : Tensor [samples, ...]
        Inputs as the model takes them, on any device: normalised floats, or integer tokens.
    labels : Tensor [samples], int64
        True classes.
    rule : str, Rule or mapping of module-path patterns to those
        How layers share relevance: ``epsilon``, ``lrp-0``, ``zplus``, ``gamma``,
        ``alpha2beta1``, ``flat``, ``box`` or a composite (``COMPOSITES``).
    start : {"target", "contrastive", "softmax-gradient"}
        Relevance of the logits z: ``z_t`` at the true class t; that and ``-z_k / (C - 1)`` at the
        others; ``p_t (δ_kt - p_k)`` with ``p = softmax(z)``.
    aggregate : {"sum", "abs", "rms"}
        Over samples: signed sum; sum of absolute values; root of the mean square. Within a
        sample, a weight's relevance is always summed over positions, and over the uses of a
        weight that is used several times (an embedding tied to a linear layer: each use apart).
    batch_size : int
        Images propagated at a time; affects memory, and results by rounding only.
    output : callable, optional
        Takes what the model returns and gives its logits, for models that return more:
        ``output=lambda o: o.logits``.

    Returns
    -------
    dict of str to Tensor
        Name of each weight of a linear, convolution, transposed convolution, embedding or
        attention layer -> relevance, shaped, typed and placed like the weight.

    Raises
    ------
    UnsupportedLayerError
        The forward pass does something for which no rule is known; names the module.
    ValueError
        Empty, non-finite or mismatched data, labels outside the classes, unknown names, a model
        without weights to score.

    Notes
    -----
    ``R_jk = a_j w_jk R_k / (z_k + ε sign z_k)`` for the ε rule. BatchNorm is folded first, on a
    copy. For ``epsilon`` a weight's relevance is the same as if scaling and shift were layers of
    their own, since weight and gradient scale inversely; what the folded bias contributes to an
    output belongs to no weight, so that a layer's weights sum to its output relevance only where
    biases are zero. Normalisation that cannot be folded acts as a
    linear map per channel with the ε rule and has no score.

    References
    ----------
    Bach et al. 2015, PLoS ONE 10(7); Montavon et al. 2019, LNCS 11700, ch. 10; Becking et al. 2022,
    ECQx (weights); Iwana et al. 2019, arXiv 1908.04351 (softmax-gradient); Ali et al. 2022, ICML
    (normalisation); Achtibat et al. 2024, arXiv 2402.05602 (attention, products).
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"unknown aggregate {aggregate!r}; known: {', '.join(AGGREGATES)}")
    return totals(
        model, images, labels, rule=rule, start=start, wanted=aggregate, batch_size=batch_size,
        output=output,
    )  # fmt: skip


@torch.inference_mode(False)
@torch.enable_grad()
def input_relevance(
    model: nn.Module, images: Tensor, labels: Tensor, *, rule: RuleLike = "epsilon",
    start: str = "target", batch_size: int = 32, output: Output | None = None,
) -> Tensor:  # fmt: skip
    """Relevance of every input value, one heatmap per image.

    Parameters
    ----------
    model, images, labels, rule, start, batch_size, output
        As for ``weight_relevance``; the images must be floating-point.

    Returns
    -------
    Tensor
        Shaped, typed and placed like the images.

    Raises
    ------
    UnsupportedLayerError, ValueError
        As for ``weight_relevance``; also ValueError for integer inputs.
    """
    check_samples(images, labels)
    if not images.is_floating_point():
        raise ValueError("integer inputs have no relevance; score the embedding's weight")
    run = Run(Inputs, model, images, labels, rule, start, batch_size, output)
    return torch.cat(run.collect().maps).to(images.device, images.dtype)


@torch.inference_mode(False)
@torch.enable_grad()
def unit_sensitivity(
    model: nn.Module, images: Tensor, labels: Tensor, *, rule: RuleLike = "epsilon",
    start: str = "target", batch_size: int = 32, output: Output | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Mean squared relevance per activation of each output unit.

    Parameters
    ----------
    model, images, labels, rule, start, batch_size, output
        As for ``weight_relevance``.

    Returns
    -------
    dict of str to Tensor [output units]
        Weight name -> ``G_k``, at least 0: the weight that the squared quantization error of unit
        k deserves. Units are the rows of the weight; for transposed convolutions the output
        channels; for embeddings its rows, averaged over the positions that look them up, 0 where
        there is none.

    Raises
    ------
    UnsupportedLayerError, ValueError
        As for ``weight_relevance``.

    Notes
    -----
    ``G_k`` is the mean over samples and positions of ``(R_k / z_k)²``, z being the output of the
    layer with BatchNorm folded into it. ``R_k / z_k`` is the modified gradient that arrives at
    the unit, so nothing is divided; to first order an error δ of the unit moves the started
    output by ``δ R_k / z_k``.
    """
    run = Run(Units, model, images, labels, rule, start, batch_size, output)
    return run.collect().means()


def filter_relevance(
    scores: Mapping[str, Tensor], model: nn.Module | None = None
) -> dict[str, Tensor]:
    """Add the scores of weights up to output channels.

    Parameters
    ----------
    scores : mapping of str to Tensor
        Weight name -> scores, shaped like the weight.
    model : nn.Module, optional
        The model scored. Needed where it has transposed convolutions, whose weights are
        [inputs, outputs / groups, ...], or layers as GPT-2's ``Conv1D``, [inputs, outputs]; all
        others are [outputs, ...].

    Returns
    -------
    dict of str to Tensor [outputs]
        Weight name -> sum over everything but the output channel.
    """
    layers = () if model is None else unwrapped(model).named_modules()
    groups = {
        f"{path}.weight".removeprefix("."): layer.groups
        for path, layer in layers
        if isinstance(layer, TRANSPOSED)
    }
    dense = {} if model is None else dense_layers(unwrapped(model))
    turned = {f"{path}.weight" for path, is_turned in dense.items() if is_turned}
    sums = {}
    for name, score in scores.items():
        score = score.mT if name in turned else score
        if name in groups:
            # [inputs, outputs / groups, ...] -> [outputs, inputs / groups, ...]
            score = score.unflatten(0, (groups[name], -1)).transpose(1, 2).flatten(0, 1)
        sums[name] = score.flatten(1).sum(1)  # [outputs]
    return sums
