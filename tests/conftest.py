"""Small networks and data that several test modules use."""

import os
import sys

import pytest
import torch
from patches import LAYERS
from torch import nn

from study.data import load, sample
from study.networks import build
from study.training import fit

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # tests/machines.py tries 2


@pytest.fixture(scope="session")
def digits():
    """Training images and labels of digits."""
    return load("digits", "train")


@pytest.fixture(scope="session")
def references(digits):
    """Ten reference images of each digit."""
    return sample(*digits, 10)


@pytest.fixture(scope="session")
def trained(digits):
    """A ResNet with BatchNorm, trained for a moment: not good, but not random either."""
    return fit(build("resnet8"), *digits, epochs=3, lr=0.1, batch_size=64)


@pytest.fixture
def made(monkeypatch):
    """Knob and file of all that is encoded, in turn."""
    module, files = sys.modules["lib.compress"], []
    whole = module.encode

    def noted(prepared, recipe):
        files.append((recipe.store.value, whole(prepared, recipe)))
        return files[-1][1]

    monkeypatch.setattr(module, "encode", noted)
    return files


@pytest.fixture(scope="session")
def validation():
    """Validation images and labels of digits."""
    return load("digits", "val")


@pytest.fixture(params=LAYERS)
def layer_case(request):
    """A layer, images for it and a mask of its weight."""
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    layer = make()
    return layer, torch.randn(60, *shape), torch.rand(layer.weight.shape) < 0.5


@pytest.fixture(scope="session")
def problem():
    """A small network of convolutions with BatchNorm in float64, images and labels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(4, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 4)),
    ).double()
    for moving in (model[1].running_mean, model[1].weight.data):
        moving.uniform_(0.5, 1.5)
    return model, torch.randn(6, 2, 8, 8).double(), torch.tensor([0, 1, 2, 3, 1, 0])
