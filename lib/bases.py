"""Base networks: how each is trained, and the checkpoint it is read from afterwards."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

from lib.data import load
from lib.files import write_bytes
from lib.models import build
from lib.train import augment_crop_flip, fit, multiplies_bfloat16, pick_device


@dataclass(frozen=True)
class Schedule:
    """Hyperparameters of ``fit`` for one network on one kind of data.

    Attributes
    ----------
    epochs : int
        Passes over the training split in one cycle of the learning rate.
    lr : float
        Highest learning rate.
    batch_size : int
        Images of a step.
    augment : bool
        Random shifts and mirrored images (colour images only).
    precision : str
        ``float32``; ``float64``, in which processors that round differently still end at the
        same network; ``bfloat16``, where the device multiplies it in hardware, else float32.
    cycles : int
        Cycles, each started from the network that the one before it left (warm restarts,
        Loshchilov and Hutter 2017). Where a checkpoint has fewer, the missing ones are added.
    """

    epochs: int
    lr: float
    batch_size: int = 128
    augment: bool = False
    precision: str = "float32"
    cycles: int = 1


SCHEDULES = {
    ("digits", "lenet300"): Schedule(20, 0.05, 64, precision="float64"),
    ("digits", "lenet5"): Schedule(15, 0.05, 64, precision="float64"),
    ("digits", "resnet8"): Schedule(15, 0.1, 64, precision="float64"),
    ("mnist", "lenet300"): Schedule(20, 0.1),
    ("mnist", "lenet5"): Schedule(20, 0.05),
    ("cifar", "resnet20"): Schedule(20, 0.2, augment=True, precision="bfloat16", cycles=2),
    ("cifar", "vgg16"): Schedule(10, 0.1, augment=True, precision="bfloat16"),
}


def schedule(dataset: str, model: str) -> Schedule:
    """Look up how a network is trained on a data set.

    Parameters
    ----------
    dataset, model : str
        Names in ``lib.data.DATASETS`` and ``lib.models.MODELS``.

    Returns
    -------
    Schedule

    Raises
    ------
    ValueError
        No such pair; the message lists the known ones.
    """
    key = ("cifar" if dataset.startswith("cifar10") else dataset, model)
    if key not in SCHEDULES:
        known = ", ".join(f"{d}/{m}" for d, m in SCHEDULES)
        raise ValueError(f"no training schedule for {dataset}/{model}; known: {known}")
    return SCHEDULES[key]


def base(dataset: str, model: str, seed: int, folder: Path, progress: bool = False) -> nn.Module:
    """Read a trained network, or train it and keep it.

    Parameters
    ----------
    dataset, model : str
        A pair of ``SCHEDULES``.
    seed : int
        Of initial weights, order and augmentation.
    folder : Path
        Where ``<dataset>-<model>-s<seed>.safetensors`` is, or is written; training in progress
        leaves a ``.partial.pt`` beside it and goes on from there after an interruption.
    progress : bool
        Show a bar while training.

    Returns
    -------
    nn.Module
        In evaluation mode, on the CPU.
    """
    how = schedule(dataset, model)
    name = f"{dataset}-{model}-s{seed}"
    path = folder / f"{name}.safetensors"
    images, labels = load(dataset, "val")
    network = build(model, channels=images.shape[1], classes=10, seed=seed)
    for cycle in range(_cycles(path), how.cycles):
        if cycle:
            network.load_state_dict(load_file(path))
        images, labels = load(dataset, "train")
        partial = folder / f"{name}.partial.pt"
        device = pick_device()
        number = torch.float64 if how.precision == "float64" else torch.float32
        network = fit(
            network.to(device, number),
            images.to(number),
            labels,
            epochs=how.epochs,
            lr=how.lr,
            batch_size=how.batch_size,
            augment=augment_crop_flip if how.augment else None,
            bfloat16=how.precision == "bfloat16" and multiplies_bfloat16(device),
            seed=seed + 1000 * cycle,
            checkpoint=partial,
            progress=f"{name}, cycle {cycle + 1} of {how.cycles}" if progress else None,
        ).to("cpu", torch.float32)
        _keep(network, path, {"schedule": repr(how), "cycles": str(cycle + 1)})
        partial.unlink()
    network.load_state_dict(load_file(path))
    return network.eval()


def _cycles(path: Path) -> int:
    """How many cycles of training a checkpoint has had."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        return int((file.metadata() or {}).get("cycles", 1))


def _keep(network: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    write_bytes(path, save(state, metadata | {"torch": torch.__version__}))
