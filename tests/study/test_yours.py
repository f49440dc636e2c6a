"""A network and a data set of your own: one line each, and the whole study works on them."""

import numpy as np
import pytest
import torch
from spread import assert_above, assert_below
from torch import nn

from lib import Recipe
from lib.quantize import Uniform
from study import DATASETS, NETWORKS, Dataset, Network, Study, data, jobs
from study.bases import SCHEDULES, Schedule


def small(classes, channels):
    return nn.Sequential(
        nn.Conv2d(channels, 4, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(classes)
    )


def fixed(classes, channels):
    network = small(classes, channels)
    network(torch.zeros(1, channels, 28, 28))  # the last layer learns how many inputs it has
    return network


def stripes(split):
    """Three classes of images with a bright stripe in a row, a column or the diagonal."""
    labels = np.arange({"train": 60, "val": 15, "test": 15}[split]) % 3
    draw = np.random.default_rng(len(split))
    images = draw.integers(0, 60, (len(labels), 1, 28, 28), dtype=np.uint8)
    for image, label in zip(images[:, 0], labels, strict=True):
        place = draw.integers(4, 24)
        part = (image[place], image[:, place], np.einsum("ii->i", image))[label]
        part[:] = 255
    return images, labels


@pytest.fixture
def alone(tmp_path, monkeypatch):
    for name in ("RESULTS_ROOT", "FIGURES_ROOT"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("SCHEDULER", raising=False)
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    # worker processes would not see what is patched here
    monkeypatch.setattr(jobs, "Parallel", lambda **_: lambda asked: (f(*a) for f, a, _ in asked))
    data.split.cache_clear()
    yield monkeypatch
    data.split.cache_clear()


def carried_through(datasets, epochs, monkeypatch, kind):
    """What a study of one case finds: accuracy before, and in a file of eight bits a weight."""
    monkeypatch.setitem(NETWORKS, "mine", Network(fixed, channels=1))
    schedule = Schedule(epochs, 0.1, 20)
    monkeypatch.setitem(SCHEDULES, (kind, "mine"), schedule)
    study = Study("quick", datasets, per_class=3)
    (case,) = study.cases
    table = study.sweep({"eight bits": Recipe(store=Uniform(8))})
    study.save_table("mine", table)
    assert (case.model, len(table)) == ("mine", 1)
    assert len(study.load_table("mine")) == 1 and study.checkpoint(case).exists()
    return study, case, table.iloc[0]


def test_a_network_of_your_own_is_trained_compressed_and_measured(alone):
    study, case, row = carried_through("digits/mine", 1, alone, "digits")
    assert_above(row["base_test_accuracy"], 50, "accuracy of the network")
    lost = abs(row["test_accuracy"] - row["base_test_accuracy"])
    assert_below(lost, 2, "points between the network and the file")
    assert_above(row["ratio"], 2, "floats over the file")
    assert study.references(case)[0].shape == (30, 1, 28, 28)


def test_a_data_set_of_your_own_is_split_normalised_and_learned(alone):
    alone.setitem(DATASETS, "mine", Dataset(stripes, (0.12,), (0.2,), classes=3))
    study, case, row = carried_through("mine/mine", 8, alone, "mine")
    images, labels = study.references(case)
    assert images.shape == (9, 1, 28, 28) and labels.unique().tolist() == [0, 1, 2]
    assert abs(float(images.mean())) < 1  # mean and deviation were applied
    assert study.base(case)(images).shape == (9, 3)
    assert_above(row["base_test_accuracy"], 60, "accuracy of the network")
    assert_above(row["test_accuracy"], 60, "accuracy of the file")
