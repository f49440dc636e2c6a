"""What relevance starts from and ends at: logits, and the weights that are scored."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..dense import dense_layers

STARTS = ("target", "contrastive", "softmax-gradient")
AGGREGATES = ("sum", "abs", "rms")
SCORED = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
    nn.ConvTranspose3d, nn.Embedding,
)  # fmt: skip


def scored_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights that get a score, by name: those of linear, convolution, embedding and attention.

    Parameters
    ----------
    model : nn.Module
        Any network.

    Returns
    -------
    dict of str to nn.Parameter
        In the order of ``model.named_parameters()``; a shared weight once, under its first name.

    Raises
    ------
    ValueError
        There is none.
    """
    found = {id(model.get_submodule(path).weight) for path in dense_layers(model)}
    for module in model.modules():
        if isinstance(module, SCORED):
            found.add(id(module._parameters.get("weight")))
            if is_parametrized(module, "weight"):  # the largest of what it is computed from
                originals = module.get_submodule("parametrizations.weight").parameters(False)
                found.add(id(max(originals, key=Tensor.numel)))
        if isinstance(module, nn.MultiheadAttention):
            found |= {id(p) for n, p in module.named_parameters(recurse=False) if "weight" in n}
    weights = {name: p for name, p in model.named_parameters() if id(p) in found}
    if not weights:
        raise ValueError("the model has no linear, convolution, embedding or attention weights")
    return weights


def start_gradient(logits: Tensor, labels: Tensor, start: str) -> Tensor:
    """Relevance of the logits divided by them, where propagation starts.

    Parameters
    ----------
    logits : Tensor [samples, classes]
    labels : Tensor [samples], int64
    start : str
        One of ``STARTS``, or ``loss``: the gradient of the summed cross-entropy.

    Returns
    -------
    Tensor [samples, classes]
    """
    target = torch.zeros_like(logits).scatter_(1, labels[:, None], 1)  # [samples, classes]
    if start == "target":
        return target
    if start == "contrastive":
        return target - (1 - target) / (logits.shape[1] - 1)
    p = logits.softmax(1)  # [samples, classes]
    if start == "loss":
        return p - target
    relevance = (p * target).sum(1, keepdim=True) * (target - p)
    return relevance / torch.where(logits == 0, torch.inf, logits)
