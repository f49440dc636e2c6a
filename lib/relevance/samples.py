"""What relevance starts from and ends at: logits and labels, and the weights that are scored."""

import torch
from torch import Tensor, nn

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
    found = set()
    for module in model.modules():
        if isinstance(module, SCORED):
            found.add(id(module.weight))
        if isinstance(module, nn.MultiheadAttention):
            found |= {id(p) for n, p in module.named_parameters(recurse=False) if "weight" in n}
    weights = {name: p for name, p in model.named_parameters() if id(p) in found}
    if not weights:
        raise ValueError("the model has no linear, convolution, embedding or attention weights")
    return weights


def check_samples(images: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless images are finite, not empty, and as many as the labels."""
    if len(images) == 0:
        raise ValueError("no reference images given")
    if labels.shape != (len(images),):
        raise ValueError(f"{len(images)} images but labels of shape {tuple(labels.shape)}")
    if labels.is_floating_point():
        raise ValueError("labels must be integers, the true classes")
    if images.is_floating_point() and not images.isfinite().all():
        raise ValueError("images contain NaN or infinite values")


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless one image's output is logits that the labels index."""
    if logits.dim() != 2:
        shape = tuple(logits.shape)
        raise ValueError(f"the model must return logits [samples, classes], got {shape}")
    if not logits.isfinite().all():
        raise ValueError("the model returns NaN or infinite logits")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, "
            f"the model has classes 0 to {logits.shape[1] - 1}"
        )


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
