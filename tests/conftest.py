"""Small networks and data that several test modules use."""

import pytest
import torch

from lib.data import load, sample
from lib.models import build
from lib.train import fit

torch.set_num_threads(1)


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
