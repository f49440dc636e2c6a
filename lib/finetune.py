"""Fine-tuning under a mask, and accuracy: the two uses that compression makes of labels."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_finite, check_samples
from .inputs import evaluated, evaluating, own, probed, split

OPTIMISERS = {
    "adam": (torch.optim.Adam, 1, {}),
    "adam-slow": (torch.optim.Adam, 0.1, {}),
    "sgd": (torch.optim.SGD, 10, {"momentum": 0.9}),  # its steps are not normalised
}
"""Optimisers of fine-tuning, with the factor of their learning rate and their settings."""

Pair = tuple[Tensor, Tensor]
Batches = Pair | Iterable[Pair]


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the indices, int64 [size], of one epoch over n images: whole batches in random order.

    Where fewer images than `size` are there, a batch has all of them.
    """
    size = min(size, n)
    order = torch.randperm(n, generator=generator)
    for start in range(0, n - size + 1, size):
        yield order[start : start + size]


def _endless(data: Batches, size: int, seed: int) -> Iterator[Pair]:
    """Batches of the data, gone through again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        epoch: Any = data
        if _is_pair(data):
            images, labels = data
            epoch = ((images[i], labels[i]) for i in batches(len(labels), size, generator))
        batch = None
        for batch in epoch:
            yield batch
        if batch is None:
            raise ValueError("the training data hold no batch")


def finetune(
    model: nn.Module, masks: Mapping[str, Tensor], data: Batches, *, steps: int,
    optimiser: str = "adam", lr: float = 1e-3, batch_size: int = 128, seed: int = 0,
    within: Callable[[int], AbstractContextManager] | None = None,
    scales: Mapping[str, float] | None = None, bfloat16: bool = False,
) -> nn.Module:  # fmt: skip
    """Train the kept weights for a number of steps; the removed ones stay zero.

    Parameters
    ----------
    model : nn.Module
        Trained in place, in evaluation mode (its BatchNorm is folded or fixed).
    masks : mapping of str to Tensor
        bool, True = kept, keyed by parameter name.
    data : tuple of Tensor, or iterable
        Training images [N, ...] and labels [N], drawn in random batches; or batches of them,
        such as a ``DataLoader``, gone through again and again.
    steps : int
        Optimiser steps.
    optimiser : str
        A key of ``OPTIMISERS``. SGD with momentum may leave dead units behind where a mask removes
        the inhibition of a layer; Adam recovers them.
    lr : float
        Learning rate at the start, cosine to zero; times the factor in ``OPTIMISERS``.
    batch_size : int
        Images of a step, where ``data`` are tensors.
    seed : int
        Of the order, likewise.
    within : callable, optional
        Step -> context of its forward and backward pass, such as one in which the network holds
        other values, whose gradients move the ones before (straight-through).
    scales : mapping of str to float, optional
        Factors of the learning rate, by name of the parameter; 1 for others.
    bfloat16 : bool
        Compute the gradients in bfloat16 where autocast deems it safe; weights stay as they are.

    Raises
    ------
    ValueError
        The data hold no batch, or the weights do not stay finite.
    """
    device = next(model.parameters()).device
    masked = [(p, masks[n].to(device)) for n, p in model.named_parameters() if n in masks]
    make, factor, settings = OPTIMISERS[optimiser]
    groups = [
        {"params": [p], "lr": lr * factor * (scales or {}).get(name, 1.0)}
        for name, p in evaluated(model).named_parameters()
    ]
    descent = make(groups if scales else model.parameters(), lr=lr * factor, **settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(descent, T_max=max(steps, 1))
    for step, (images, labels) in enumerate(islice(_endless(data, batch_size, seed), steps)):
        descent.zero_grad()
        with within(step) if within else nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                loss = F.cross_entropy(model(own(images, model)), labels.to(device))
            loss.backward()
        descent.step()
        schedule.step()
        with torch.no_grad():
            for parameter, mask in masked:
                parameter.mul_(mask)
    descent.zero_grad()
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise ValueError(
            f"fine-tuning with {optimiser} diverged: take another of {', '.join(OPTIMISERS)}, or a "
            f"learning rate below {lr}"
        )
    return model


def check_batches(name: str, data: Batches | None) -> None:
    """Raise ValueError unless data are images and labels, or batches that can be read again."""
    if data is None:
        return
    if isinstance(data, (tuple, list)) and len(data) == 2:
        images, labels = data
        if not isinstance(images, (tuple, list)):  # two batches
            try:
                return check_samples(images, labels)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    if isinstance(data, (str, Tensor, Mapping)) or not isinstance(data, Iterable):
        kind = type(data).__name__
        raise ValueError(f"{name} must be (images, labels) or a DataLoader, not a {kind}")
    if isinstance(data, (tuple, list)) and any(isinstance(part, Tensor) for part in data):
        raise ValueError(
            f"{name} must be (images, labels) or batches of those, not {len(data)} parts"
        )
    if isinstance(data, Iterator):
        raise ValueError(
            f"{name} can be read only once: give (images, labels), a list of batches or a "
            "DataLoader"
        )


def _is_pair(data: Batches) -> TypeGuard[Pair]:
    pair = isinstance(data, (tuple, list)) and len(data) == 2
    return pair and all(isinstance(part, Tensor) for part in data)


def accuracy(model: nn.Module, data: Batches) -> float:
    """Accuracy in percent on images and labels, or on batches of them."""
    if _is_pair(data):
        return evaluate(model, *data)
    found = [(evaluate(model, images, labels), len(labels)) for images, labels in data]
    if not found:
        raise ValueError("no images to evaluate on")
    return sum(share * count for share, count in found) / sum(count for _, count in found)


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 100) -> float:
    """Accuracy in percent: share of images [N, ...] whose largest output is their label's [N].

    The model runs in evaluation mode on `batch_size` images at a time; its mode is put back.
    ValueError where it does not run on them, or where a logit is not finite.
    """
    if len(labels) == 0:
        raise ValueError("no images to evaluate on")
    correct = 0
    with evaluating(model):
        for x, y in zip(split(images, batch_size), split(labels, batch_size), strict=True):
            check_finite(logits := probed(model, x))
            correct += int((logits.argmax(1).cpu() == y.cpu()).sum())
    return 100 * correct / len(labels)
