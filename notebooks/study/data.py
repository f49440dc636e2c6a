"""Images and labels, split and normalised once for everybody: ``DATASETS[name] = Dataset(...)``."""

import os
import tarfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from lib.files import write_bytes

from .paths import CACHE, check_known

SPLITS = ("train", "val", "test")
_Split = tuple[np.ndarray, np.ndarray]
_CIFAR_ARCHIVE = "CIFAR-10-images.tar.gz"
_CIFAR_FOLDER = "CIFAR-10-images"


class DataNotFoundError(FileNotFoundError):
    """The data set is neither under ``DATA_ROOT`` nor can it be downloaded."""


def _missing(name: str, layout: str, download: str) -> DataNotFoundError:
    root = os.environ.get("DATA_ROOT", "not set")
    return DataNotFoundError(
        f"data set {name!r} was not found: set DATA_ROOT (now: {root}) to a folder that holds "
        f"{layout}, or {download}"
    )


def _torchvision(kind: str, name: str, layout: str, split: str) -> _Split:
    """Read a torchvision data set from ``DATA_ROOT``, else from the cache, else download it."""
    import torchvision.datasets  # here, because it takes seconds to import

    dataset = partial(getattr(torchvision.datasets, kind), train=split != "test")
    found, root = None, os.environ.get("DATA_ROOT")
    with suppress(RuntimeError):
        found = dataset(root) if root else None
    try:
        found = dataset(CACHE / "data", download=True) if found is None else found
    except (URLError, RuntimeError, OSError) as error:
        raise _missing(name, layout, "connect to a network and run again to download it") from error
    pixels, labels = np.asarray(found.data), np.asarray(found.targets)
    pixels = pixels.reshape(*pixels.shape[:3], -1).transpose(0, 3, 1, 2)  # [N, C, H, W]
    return (pixels, labels) if split == "test" else _held_out(pixels, labels)[split]


def _digits() -> dict[str, _Split]:
    images, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(images.reshape(-1, 1, 8, 8) / 16).float()
    large = F.interpolate(small, size=28, mode="bilinear", align_corners=False)
    pixels = (large * 255).round().to(torch.uint8).numpy()
    rest_x, test_x, rest_y, test_y = train_test_split(
        pixels, labels, test_size=360, stratify=labels, random_state=0
    )
    train_x, val_x, train_y, val_y = train_test_split(
        rest_x, rest_y, test_size=360, stratify=rest_y, random_state=0
    )
    return {"train": (train_x, train_y), "val": (val_x, val_y), "test": (test_x, test_y)}


def _held_out(images: np.ndarray, labels: np.ndarray) -> dict[str, _Split]:
    train, val = train_test_split(
        np.arange(len(labels)), test_size=5000, stratify=labels, random_state=0
    )
    return {"train": (images[train], labels[train]), "val": (images[val], labels[val])}


def _decode_cifar_jpeg(root: Path) -> dict[str, np.ndarray]:
    """Decode all JPEG files, in the order of their names, from the folder or its archive."""
    archive, folder = root / _CIFAR_ARCHIVE, root / _CIFAR_FOLDER
    if folder.is_dir():
        files = {str(p.relative_to(root)): p.read_bytes() for p in folder.rglob("*.jpg")}
    elif archive.is_file():
        with tarfile.open(archive) as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")}
    else:
        raise _missing(
            "cifar10-jpeg",
            f"{_CIFAR_ARCHIVE} or {_CIFAR_FOLDER}/{{train,test}}/<class>/*.jpg",
            "use the original, 'cifar10', which is downloaded where there is a network",
        )
    names = sorted(files)
    classes = sorted({name.split("/")[-2] for name in names})
    arrays = {}
    for split in ("train", "test"):
        chosen = [name for name in names if name.split("/")[-3] == split]
        arrays[f"{split}_x"] = np.stack(
            [np.asarray(Image.open(BytesIO(files[n])).convert("RGB")) for n in chosen]
        ).transpose(0, 3, 1, 2)
        arrays[f"{split}_y"] = np.array([classes.index(n.split("/")[-2]) for n in chosen])
    return arrays


def _cifar10_jpeg(split: str) -> _Split:
    cached = CACHE / "data" / "cifar10-jpeg.npz"
    if not cached.exists():
        arrays = _decode_cifar_jpeg(Path(os.environ.get("DATA_ROOT", CACHE / "data")))
        cached.parent.mkdir(parents=True, exist_ok=True)
        np.savez(content := BytesIO(), **arrays)
        write_bytes(cached, content.getvalue())
    with np.load(cached) as arrays:
        if split == "test":
            return arrays["test_x"], arrays["test_y"]
        return _held_out(arrays["train_x"], arrays["train_y"])[split]


@dataclass(frozen=True)
class Dataset:
    """One data set."""

    read: Callable[[str], _Split]
    """A split of ``SPLITS`` -> (uint8 pixels [N, C, H, W], integer labels [N])."""
    mean: tuple[float, ...]  # of each channel, of pixels divided by 255
    std: tuple[float, ...]
    classes: int = 10
    kind: str = ""  # data sets of one kind are trained on alike; by default the own name


_MNIST = ("MNIST", "mnist", "MNIST/raw/*-ubyte (torchvision.datasets.MNIST)")
_CIFAR10 = ("CIFAR10", "cifar10", "cifar-10-batches-py (torchvision.datasets.CIFAR10)")
_CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616), "kind": "cifar"}
DATASETS: dict[str, Dataset] = {
    "digits": Dataset(lambda split: _digits()[split], (0.3053,), (0.3491,)),
    "mnist": Dataset(partial(_torchvision, *_MNIST), (0.1307,), (0.3081,)),
    "cifar10": Dataset(partial(_torchvision, *_CIFAR10), **_CIFAR),
    "cifar10-jpeg": Dataset(_cifar10_jpeg, **_CIFAR),
}


def kind(name: str) -> str:
    """What a data set is to be trained on like: its ``kind``, or its name."""
    return DATASETS[name].kind or name


def load(name: str, split: str) -> tuple[Tensor, Tensor]:
    """Load one split of a data set: images float32 [N, C, H, W] and labels int64 [N].

    Splits are ``train``, ``val`` (held out of the training images, stratified) and ``test``. Of
    each channel the data set's mean is subtracted, and the rest divided by its standard deviation.

    Raises
    ------
    ValueError
        Unknown data set or split; the message lists the known ones.
    DataNotFoundError
        The files are not there and no network is; the message says the two ways to get them.
    """
    check_known("data set", name, DATASETS)
    check_known("split", split, SPLITS)
    dataset = DATASETS[name]
    pixels, labels = dataset.read(split)
    images = torch.from_numpy(np.ascontiguousarray(pixels)).float().div_(255)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (dataset.mean, dataset.std))
    images.sub_(mean).div_(std)
    return images, torch.from_numpy(np.ascontiguousarray(labels)).long()


@cache
def split(dataset: str, part: str) -> tuple[Tensor, Tensor]:
    """Images and labels of a split, as ``load`` gives them, read once in a process."""
    return load(dataset, part)


def sample(images: Tensor, labels: Tensor, per_class: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw ``per_class`` images of each class, classes interleaved.

    A class with fewer gives all that it has. A larger ``per_class`` with the same seed keeps the
    images of a smaller one.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank = torch.empty_like(labels)
    for label in labels.unique():
        members = order[labels[order] == label]
        rank[members] = torch.arange(len(members), device=labels.device)
    chosen = order[rank[order] < per_class]
    chosen = chosen[torch.argsort(rank[chosen], stable=True)]
    return images[chosen], labels[chosen]
