import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from study import data
from study.data import DATASETS, DataNotFoundError, Dataset, load, sample
from study.profiles import PROFILES, cases


def test_digits_are_normalised_floats_with_labels():
    images, labels = load("digits", "train")
    assert images.shape[1:] == (1, 28, 28) and images.dtype == torch.float32
    assert labels.dtype == torch.int64 and labels.unique().tolist() == list(range(10))
    assert abs(images.mean()) < 0.01 and abs(images.std() - 1) < 0.1


def test_splits_partition_the_digits():
    sizes = [len(load("digits", split)[1]) for split in ("train", "val", "test")]
    assert sum(sizes) == len(load_digits().target) and sizes[1] == sizes[2] == 360
    together = torch.cat([load("digits", split)[0].flatten(1) for split in data.SPLITS])
    # scikit-learn's digits hold one pair of equal images
    assert len(together.unique(dim=0)) >= len(together) - 1


@pytest.mark.parametrize("name, split", [("mnits", "train"), ("digits", "valid")])
def test_unknown_names_list_the_known(name, split):
    known = "val" if name == "digits" else "cifar10-jpeg"
    with pytest.raises(ValueError, match=f"unknown .*known: .*{known}"):
        load(name, split)


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_missing_data_say_what_is_missing_and_two_ways_to_get_it(name, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(DataNotFoundError, match=f"'{name}' was not found: set DATA_ROOT .* or "):
        load(name, "test")


def _write_idx(path, values):
    head = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(head + values.tobytes())


def test_mnist_is_read_from_data_root(tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        _write_idx(raw / f"{part}-images-idx3-ubyte", pixels)
        _write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 10)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    images, labels = load("mnist", "test")
    expected = (torch.from_numpy(pixels).float() / 255 - 0.1307) / 0.3081
    assert torch.allclose(images[:, 0], expected, atol=1e-6)
    assert labels.tolist() == [i % 10 for i in range(20)]


def test_jpeg_copy_is_read_in_the_order_of_names(tmp_path, monkeypatch):
    for split in ("train", "test"):
        for shade, name in ((250, "cat"), (5, "ant")):
            folder = tmp_path / "CIFAR-10-images" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (shade,) * 3).save(folder / "0000.jpg")
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    images, labels = load("cifar10-jpeg", "test")
    assert labels.tolist() == [0, 1]
    assert images[0].mean() < -1 and images[1].mean() > 1
    again, _ = load("cifar10-jpeg", "test")
    assert torch.equal(images, again)


def test_sample_draws_the_same_number_of_each_class(digits):
    images, labels = sample(*digits, 7, seed=3)
    assert labels.bincount().tolist() == [7] * 10
    assert sorted(labels[:10].tolist()) == list(range(10))
    larger, _ = sample(*digits, 9, seed=3)
    assert torch.equal(images, larger[: len(images)])
    assert not torch.equal(images, sample(*digits, 7, seed=4)[0])


def test_a_data_set_from_outside_is_one_line(monkeypatch):
    def read(split):
        return np.full((4, 1, 28, 28), 51, np.uint8), np.arange(4)

    monkeypatch.setitem(DATASETS, "mine", Dataset(read, (0.2,), (0.5,), classes=4, kind="mnist"))
    images, labels = load("mine", "val")
    assert images.shape == (4, 1, 28, 28) and images.abs().max() < 1e-6
    assert labels.tolist() == [0, 1, 2, 3]
    chosen = cases(PROFILES["paper"], "mine/lenet5")
    assert [str(case) for case in chosen] == ["mine-lenet5-s0", "mine-lenet5-s1", "mine-lenet5-s2"]


def _fake_mnist(root, pixels, labels):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, name in (("train", "train"), ("test", "t10k")):
        _write_idx(raw / f"{name}-images-idx3-ubyte", pixels[part].mean(1).astype(np.uint8))
        _write_idx(raw / f"{name}-labels-idx1-ubyte", labels[part])


def _fake_cifar10(root, pixels, labels, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for part, name in (("train", "data_batch_1"), ("test", "test_batch")):
        content = {"data": pixels[part].reshape(len(labels[part]), -1), "labels": [*labels[part]]}
        (folder / name).write_bytes(pickle.dumps(content))
    names = pickle.dumps({"label_names": [str(i) for i in range(10)]})
    (folder / "batches.meta").write_bytes(names)
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": None})


def _fake_jpeg(cache, pixels, labels):
    (cache / "data").mkdir(parents=True)
    arrays = {f"{p}_{k}": v[p] for k, v in (("x", pixels), ("y", labels)) for p in pixels}
    np.savez(cache / "data" / "cifar10-jpeg.npz", **arrays)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar10-jpeg"])
def test_the_three_splits_are_apart_and_each_is_read_from_its_own_file(name, tmp_path, monkeypatch):
    # The first pixels of each image are its number; those of the test file begin at 20,000. The
    # label follows from the number, so that images and labels cannot be mixed up.
    pixels, labels = {}, {}
    for part, first, count in (("train", 0, 5200), ("test", 20_000, 300)):
        number = np.arange(first, first + count)
        pixels[part] = np.zeros((count, 3, 32, 32), np.uint8)
        pixels[part][:, :, 0, 0] = (number // 250)[:, None]
        pixels[part][:, :, 0, 1] = (number % 250)[:, None]
        labels[part] = (number // 7 % 10).astype(np.uint8)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    if name == "mnist":
        _fake_mnist(tmp_path, pixels, labels)
    elif name == "cifar10":
        _fake_cifar10(tmp_path, pixels, labels, monkeypatch)
    else:
        _fake_jpeg(tmp_path / "cache", pixels, labels)
    found = {}
    for part in data.SPLITS:
        images, wanted = load(name, part)
        mean, std = DATASETS[name].mean[0], DATASETS[name].std[0]
        high, low = (images[:, 0, 0, :2] * std + mean).mul(255).round().long().T
        number = high * 250 + low
        assert torch.equal(wanted, number // 7 % 10)
        found[part] = set(number.tolist())
    assert found["test"] == set(range(20_000, 20_300))
    assert len(found["val"]) == 5000 and not found["val"] & found["train"]
    assert found["val"] | found["train"] == set(range(5200))
