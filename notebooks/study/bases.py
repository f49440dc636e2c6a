"""Base networks: how each is trained, and the checkpoint it is read from afterwards."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lib import Compressed
from lib.files import write_bytes
from lib.quantize import uniform

from .data import DATASETS, kind, load
from .networks import build
from .training import Passes, augment_crop_flip, fit, multiplies_bfloat16, pick_device


@dataclass(frozen=True)
class Schedule:
    """Hyperparameters of ``fit`` for one network on one kind of data."""

    epochs: int  # passes over the training split in one cycle of the learning rate
    lr: float  # the highest
    batch_size: int = 128
    augment: bool = False  # random shifts and mirrored images (colour images only)
    precision: str = "float32"
    """``float32``; ``float64``, in which processors that round differently still end at the same
    network; ``bfloat16``, where the device multiplies it in hardware, else float32."""
    cycles: int = 1
    """Each started from the network that the one before it left (warm restarts, Loshchilov and
    Hutter 2017). Where a checkpoint has fewer, the missing ones are added."""
    averaged: int = 0
    """Passes after the last cycle at an eighth of ``lr``, over which weights are averaged. A
    checkpoint that has fewer is averaged anew."""
    bits: int = 0
    """Of the weights in the checkpoint, for networks too large to be kept as floats; the network
    that everything starts from is then the decoded one. Zero: float32."""

    @property
    def passes(self) -> int:
        """Over the training split, in all."""
        return self.epochs * self.cycles + self.averaged


SCHEDULES = {
    ("digits", "lenet300"): Schedule(20, 0.05, 64, precision="float64"),
    ("digits", "lenet5"): Schedule(15, 0.05, 64, precision="float64"),
    ("digits", "resnet8"): Schedule(15, 0.1, 64, precision="float64"),
    ("mnist", "lenet300"): Schedule(20, 0.1),
    ("mnist", "lenet5"): Schedule(20, 0.05),
    ("cifar", "resnet20"): Schedule(
        20, 0.2, augment=True, precision="bfloat16", cycles=4, averaged=5
    ),
    ("cifar", "vgg16"): Schedule(20, 0.1, augment=True, precision="bfloat16", bits=8),
}


def schedule(dataset: str, model: str) -> Schedule:
    """How a network is trained on a data set; a ValueError lists the pairs that are known."""
    key = (kind(dataset), model)
    if key not in SCHEDULES:
        known = ", ".join(f"{d}/{m}" for d, m in SCHEDULES)
        raise ValueError(f"no training schedule for {dataset}/{model}; known: {known}")
    return SCHEDULES[key]


def stream(dataset: str, model: str, images: Tensor, labels: Tensor, seed: int) -> Passes:
    """Training data in batches, as the base network saw them: augmented where they were."""
    how = SCHEDULES[kind(dataset), model]
    augment = augment_crop_flip if how.augment else None
    return Passes(images.to(pick_device()), labels, 128, augment, seed)


def base(dataset: str, model: str, seed: int, folder: Path, progress: bool = False) -> nn.Module:
    """Read a trained network, or train it and keep it; in evaluation mode, on the CPU.

    Parameters
    ----------
    dataset, model : str
        A pair of ``SCHEDULES``.
    seed : int
        Of initial weights, order and augmentation.
    folder : Path
        Where ``checkpoint`` is, or is written; training in progress leaves a ``.partial.pt`` beside
        it and goes on from there after an interruption.
    progress : bool
        Show a bar while training.
    """
    how = schedule(dataset, model)
    name = f"{dataset}-{model}-s{seed}"
    path = checkpoint(dataset, model, seed, folder)
    data = DATASETS[dataset]
    network = build(model, channels=len(data.mean), classes=data.classes, seed=seed)
    had = _training(path)
    stages = [("cycles", cycle + 1) for cycle in range(had["cycles"], how.cycles)]
    if how.averaged and (stages or had["averaged"] < how.averaged):
        stages.append(("averaged", how.averaged))
    for stage, count in stages:
        if path.exists():
            network.load_state_dict(_read(path))
        images, labels = load(dataset, "train")
        partial = folder / f"{name}-{stage}-{count}.partial.pt"
        device = pick_device()
        number = torch.float64 if how.precision == "float64" else torch.float32
        cycle, half = stage == "cycles", how.precision == "bfloat16" and multiplies_bfloat16(device)
        network = fit(
            network.to(device, number),
            images.to(number),
            labels,
            epochs=how.epochs if cycle else how.averaged,
            lr=how.lr if cycle else how.lr / 8,
            batch_size=how.batch_size,
            augment=augment_crop_flip if how.augment else None,
            bfloat16=half,
            average=not cycle,
            seed=seed + 1000 * (count - 1 if cycle else had["cycles"]),
            checkpoint=partial,
            progress=f"{name}, {stage}: {count}" if progress else None,
        ).to("cpu", torch.float32)
        had = {"cycles": count, "averaged": 0} if cycle else had | {"averaged": count}
        remarks = {"schedule": repr(how), "torch": torch.__version__, **had}
        remarks |= {"device": device.type, "bfloat16": half}
        _keep(network, path, {key: str(value) for key, value in remarks.items()}, how.bits)
        partial.unlink()
    network.load_state_dict(_read(path))
    return network.eval()


def is_trained(dataset: str, model: str, seed: int, folder: Path) -> bool:
    """Whether ``base`` would read a network as it is, rather than train."""
    how, had = schedule(dataset, model), _training(checkpoint(dataset, model, seed, folder))
    return had["cycles"] >= how.cycles and had["averaged"] >= how.averaged


def checkpoint(dataset: str, model: str, seed: int, folder: Path) -> Path:
    """The file of a base network; ``.xaic`` where the schedule has ``bits``."""
    suffix = "xaic" if schedule(dataset, model).bits else "safetensors"
    return folder / f"{dataset}-{model}-s{seed}.{suffix}"


def _training(path: Path) -> dict[str, int]:
    """How many cycles of training, and averaged passes after them, a checkpoint has had."""
    if not path.exists():
        return {"cycles": 0, "averaged": 0}
    if path.suffix == ".xaic":
        remarks = Compressed.load(path).meta
    else:
        try:
            with safe_open(path, "pt") as file:  # its header only, not the tensors
                remarks = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged ({error}): restore it, or remove it to train anew"
            ) from error
    return {"cycles": int(remarks.get("cycles", 1)), "averaged": int(remarks.get("averaged", 0))}


def _read(path: Path) -> dict[str, Tensor]:
    return Compressed.load(path).state_dict() if path.suffix == ".xaic" else load_file(path)


def _keep(network: nn.Module, path: Path, remarks: dict[str, str], bits: int) -> None:
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    if bits:
        weights = {key: uniform(value, bits) for key, value in state.items() if value.ndim > 1}
        Compressed(state | weights, remarks).save(path)
    else:
        write_bytes(path, save(state, remarks))
