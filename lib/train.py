"""Training, fine-tuning under a mask, and accuracy."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from tqdm import tqdm

OPTIMISERS = {
    "adam": (torch.optim.Adam, 1, {}),
    "adam-slow": (torch.optim.Adam, 0.1, {}),
    "sgd": (torch.optim.SGD, 10, {"momentum": 0.9}),  # its steps are not normalised
}
"""Optimisers of fine-tuning, with the factor of their learning rate and their settings."""

Batches = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]


def pick_device() -> torch.device:
    """The device to train on: a CUDA card where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities()
    return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def augment_crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to four pixels and mirror half of them (He et al. 2016).

    Parameters
    ----------
    images : Tensor
        [N, C, H, W]; pixels that move in from outside are zero.
    generator : torch.Generator
        On the CPU; source of all the draws.

    Returns
    -------
    Tensor
        [N, C, H, W].
    """
    n, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, n, 1), generator=generator).to(images.device)
    flip = torch.rand((n, 1), generator=generator).to(images.device) < 0.5
    rows = top + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(n, -1)
    columns = left + torch.where(flip, width - 1 - columns, columns)
    index = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the indices of one epoch in random order, whole batches only.

    Parameters
    ----------
    n, size : int
        Images, and images of a batch (all of them where fewer are there).
    generator : torch.Generator
        Of the order.

    Yields
    ------
    Tensor
        int64 [size].
    """
    size = min(size, n)
    order = torch.randperm(n, generator=generator)
    for start in range(0, n - size + 1, size):
        yield order[start : start + size]


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    lr: float,
    batch_size: int = 128,
    weight_decay: float = 5e-4,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    bfloat16: bool = False,
    average: bool = False,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: str | None = None,
) -> nn.Module:
    """Train a network from where it stands, with SGD and a one-cycle or a constant learning rate.

    Parameters
    ----------
    model : nn.Module
        Trained in place, on the device it is on.
    images, labels : Tensor
        float32 [N, C, H, W] and int64 [N].
    epochs : int
        Passes over the images.
    lr : float
        Highest learning rate of the cycle (Smith and Topin 2018), or the constant one;
        Nesterov momentum 0.9.
    batch_size : int
        Images of a step.
    weight_decay : float
        L2 penalty of all parameters.
    augment : callable, optional
        (images, generator) -> images, applied to each batch.
    bfloat16 : bool
        Compute in bfloat16 where autocast deems it safe.
    average : bool
        Keep the learning rate constant, and return the mean of the weights after each step, with
        BatchNorm's statistics estimated anew on one more pass over the images.
    seed : int
        Of order and augmentation.
    checkpoint : Path, optional
        File that holds the state after the last whole epoch; where it exists, training goes on
        from there. The file is removed by the caller once the result is stored.
    progress : str, optional
        Label of a progress bar; none without it.

    Returns
    -------
    nn.Module
        The same model, in evaluation mode.

    References
    ----------
    Polyak and Juditsky: Acceleration of Stochastic Approximation by Averaging, 1992, and Izmailov
    et al.: Averaging Weights Leads to Wider Optima and Better Generalization, UAI 2018,
    algorithm 1: ``average``.
    """
    device = next(model.parameters()).device
    model.train().to(memory_format=torch.channels_last)
    images = images.to(device)
    labels = labels.to(device)
    steps = max(1, len(labels) // min(batch_size, len(labels)))
    optimiser = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )
    if average:
        schedule = torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1)
    else:
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, max_lr=lr, total_steps=epochs * steps, pct_start=0.3
        )
    mean = AveragedModel(model) if average else None
    first = 0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"]
        if mean is not None:
            mean.load_state_dict(state["mean"])

    def passes(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed * 10_007 + epoch)
        for index in batches(len(labels), batch_size, generator):
            batch = images[index.to(device)]
            batch = batch if augment is None else augment(batch, generator)
            yield batch.contiguous(memory_format=torch.channels_last), labels[index.to(device)]

    bar = tqdm(total=epochs * steps, initial=first * steps, desc=progress, disable=progress is None)
    for epoch in range(first, epochs):
        for batch, wanted in passes(epoch):
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                loss = F.cross_entropy(model(batch).float(), wanted)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if mean is not None:
                mean.update_parameters(model)
            bar.update()
        if checkpoint is not None:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            partial = checkpoint.with_suffix(f".{os.getpid()}")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "schedule": schedule.state_dict(),
                    "mean": None if mean is None else mean.state_dict(),
                    "epoch": epoch + 1,
                },
                partial,
            )
            partial.replace(checkpoint)
    bar.close()
    if mean is not None:
        update_bn((batch for batch, _ in passes(epochs)), mean)
        model.load_state_dict(mean.module.state_dict())
    return model.to(memory_format=torch.contiguous_format).eval()


def _endless(data: Batches, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        empty = True
        if isinstance(data, tuple):
            images, labels = data
            for index in batches(len(labels), batch_size, generator):
                empty = False
                yield images[index], labels[index]
        else:
            for images, labels in data:
                empty = False
                yield images, labels
        if empty:
            raise ValueError("the training data hold no batch")


def finetune(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    data: Batches,
    *,
    steps: int,
    optimiser: str = "adam",
    lr: float = 1e-3,
    batch_size: int = 128,
    seed: int = 0,
) -> nn.Module:
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

    Returns
    -------
    nn.Module
        The same model.

    Raises
    ------
    ValueError
        The data hold no batch, or the weights do not stay finite.
    """
    device = next(model.parameters()).device
    masked = [(p, masks[n].to(device)) for n, p in model.named_parameters() if n in masks]
    make, factor, settings = OPTIMISERS[optimiser]
    descent = make(model.eval().parameters(), lr=lr * factor, **settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(descent, T_max=max(steps, 1))
    for images, labels in islice(_endless(data, batch_size, seed), steps):
        descent.zero_grad()
        F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
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


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 100) -> float:
    """Accuracy of a network.

    Parameters
    ----------
    model : nn.Module
        Evaluated in evaluation mode; its mode is put back.
    images, labels : Tensor
        float32 [N, C, H, W] and int64 [N].
    batch_size : int
        Images of a forward pass.

    Returns
    -------
    float
        Share of images whose largest output is their label's, in percent.
    """
    if len(labels) == 0:
        raise ValueError("no images to evaluate on")
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    correct = 0
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)  # faster convolutions
        correct += int((model(x.to(device)).argmax(1).cpu() == y.cpu()).sum())
    model.train(training)
    return 100 * correct / len(labels)
