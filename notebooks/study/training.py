"""Training of the base networks."""

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from lib.files import write_bytes
from lib.finetune import batches

from .progress import bar

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""(images, generator) -> images, applied to each batch."""


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
    """Shift each image [N, C, H, W] by up to four pixels and mirror half of them (He et al. 2016).

    Pixels that move in from outside are zero. ``generator`` is on the CPU, source of all the draws.
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


def _resumed(checkpoint: Path, device: torch.device) -> dict:
    try:
        return torch.load(checkpoint, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{checkpoint} is damaged: remove it to train from the start") from error


@dataclass(eq=False)
class Passes:
    """Training data as batches: going through them is one pass, in another order each time."""

    images: Tensor  # [N, C, H, W]
    labels: Tensor  # int64 [N], moved to where the images are
    size: int  # of a batch
    augment: Augment | None
    seed: int  # of order and augmentation
    epoch: int = 0  # the next one

    def __post_init__(self):
        self.labels = self.labels.to(self.images.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 10_007 + self.epoch)
        self.epoch += 1
        for index in batches(len(self.labels), self.size, generator):
            index = index.to(self.images.device)
            batch = self.images[index]
            batch = batch if self.augment is None else self.augment(batch, generator)
            yield batch, self.labels[index]


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    lr: float,
    batch_size: int = 128,
    augment: Augment | None = None,
    bfloat16: bool = False,
    average: bool = False,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: str | None = None,
    after: Callable[[int], None] | None = None,
) -> nn.Module:
    """Train a network from where it stands, and return it in evaluation mode.

    By SGD with Nesterov momentum 0.9, an L2 penalty of 5e-4 on all parameters, and a learning rate
    of one cycle (Smith and Topin 2018).

    Parameters
    ----------
    model : nn.Module
        Trained in place, on the device it is on.
    images, labels : Tensor
        float32 [N, C, H, W] and int64 [N].
    lr : float
        Highest learning rate of the cycle, or the constant one.
    bfloat16 : bool
        Compute in bfloat16 where autocast deems it safe.
    average : bool
        Keep the learning rate constant, and return the mean of the weights after each step, with
        BatchNorm's statistics estimated anew on one more pass over the images.
    checkpoint : Path, optional
        File that holds the state after the last whole epoch; where it exists, training goes on
        from there. The file is removed by the caller once the result is stored.
    progress : str, optional
        Label of a progress bar; none without it.
    after : callable, optional
        Called after each epoch with its number, from one.

    References
    ----------
    Polyak and Juditsky: Acceleration of Stochastic Approximation by Averaging, 1992, and Izmailov
    et al.: Averaging Weights Leads to Wider Optima and Better Generalization, UAI 2018,
    algorithm 1: ``average``.
    """
    device = next(model.parameters()).device
    model.train().to(memory_format=torch.channels_last)
    passes = Passes(images.to(device), labels, batch_size, augment, seed)
    steps = max(1, len(labels) // min(batch_size, len(labels)))
    optimiser = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    if average:
        schedule = torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1)
    else:
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, max_lr=lr, total_steps=epochs * steps, pct_start=0.3
        )
    mean = AveragedModel(model) if average else None
    kept = {"model": model, "optimiser": optimiser, "schedule": schedule}
    kept |= {"mean": mean} if average else {}
    first = 0
    if checkpoint is not None and checkpoint.exists():
        state = _resumed(checkpoint, device)
        first = state["epoch"]
        for name, part in kept.items():
            part.load_state_dict(state[name])

    shown = {"total": epochs * steps, "initial": first * steps, "desc": progress}
    watched = bar(**shown, disable=progress is None)
    passes.epoch = first
    for epoch in range(first, epochs):
        for batch, wanted in passes:
            batch = batch.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                loss = F.cross_entropy(model(batch).float(), wanted)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if mean is not None:
                mean.update_parameters(model)
            watched.update()
        if after is not None:
            after(epoch + 1)
        if checkpoint is not None:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            states = {name: part.state_dict() for name, part in kept.items()}
            torch.save(states | {"epoch": epoch + 1}, state := BytesIO())
            write_bytes(checkpoint, state.getvalue())
    watched.close()
    if mean is not None:
        update_bn((b.contiguous(memory_format=torch.channels_last) for b, _ in passes), mean)
        model.load_state_dict(mean.module.state_dict())
    return model.to(memory_format=torch.contiguous_format).eval()
