"""Models and data that cannot be used are refused by a sentence that names the remedy."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from small import small_data as _data
from small import small_net as _net
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lib import compress
from lib.relevance import (
    UnsupportedLayerError,
    input_relevance,
    unit_sensitivity,
    weight_relevance,
)

CALLS = (compress, weight_relevance, input_relevance, unit_sensitivity)


class Around(nn.Module):
    """The network, its output in something else."""

    def __init__(self, function):
        super().__init__()
        self.n, self.function = _net(), function

    def forward(self, x):
        return self.function(self.n, x)


def _pruned():
    model = _net()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def _hooked(function):
    model = _net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(model[0])
    return model


def _nostats():
    norm = nn.BatchNorm1d(16, track_running_stats=False)
    return nn.Sequential(nn.Linear(20, 16), norm, nn.Linear(16, 4))


class Saving(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def _scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(_net())


MODELS = {
    "path": (lambda: "model.pt", "path 'model.pt'"),
    "state_dict": (lambda: _net().state_dict(), "load_state_dict"),
    "class": (lambda: nn.Linear, "class Linear"),
    "exported": (lambda: torch.export.export(_net(), (_data()[0][:2],)), "exported from"),
    "exported as a module": (
        lambda: torch.export.export(_net(), (_data()[0][:2],)).module(),
        "exported program.*exported from",
    ),
    "exported and unflattened": (
        lambda: torch.export.unflatten(torch.export.export(_net(), (_data()[0][:2],))),
        "exported program.*exported from",
    ),
    "scripted": (_scripted, "TorchScript"),
    "masks": (_pruned, r"'0' \(Linear\).*prune.remove"),
    "weight_norm": (lambda: _hooked(nn.utils.weight_norm), "'0'.*remove_weight_norm"),
    "spectral_norm": (lambda: _hooked(nn.utils.spectral_norm), "'0'.*remove_spectral_norm"),
    "no statistics": (_nostats, r"'1' \(BatchNorm1d\).*track_running_stats=True"),
    "checkpoint": (lambda: nn.Sequential(nn.Linear(20, 20), Saving(*_net())), "checkpoint off"),
    "tuple": (lambda: Around(lambda n, x: (n(x), x)), r"tuple of 2.*output=lambda o: o\[0\]"),
    "dict": (lambda: Around(lambda n, x: {"logits": n(x)}), "dict with 'logits'.*output="),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_unusable_models_name_the_remedy(name):
    make, message = MODELS[name]
    for call in CALLS:
        with pytest.raises((ValueError, UnsupportedLayerError), match=message):
            call(make(), *_data())


DATA = {
    "array": (lambda x, y: (x.numpy(), y), r"images must be a torch.Tensor.*as_tensor\(images\)"),
    "list": (lambda x, y: (x, y.tolist()), r"labels must be a torch.Tensor.*as_tensor\(labels\)"),
    "loader": (lambda x, y: (DataLoader(TensorDataset(x, y)), y), "take a batch out of it"),
    "one-hot": (lambda x, y: (x, F.one_hot(y, 4)), r"one-hot.*labels.argmax\(1\)"),
    "other shape": (
        lambda x, y: (x[:, :5], y),
        r"does not run on images like these, float32 \[5\]",
    ),
    "none": (lambda x, y: (x[:0], y[:0]), "no reference images"),
    "range": (lambda x, y: (x, y + 1), "labels run from 1 to 4"),
}


@pytest.mark.parametrize("name", DATA)
def test_unusable_data_name_the_remedy(name):
    for call in CALLS:
        with pytest.raises(ValueError, match=DATA[name][1]):
            call(_net(), *DATA[name][0](*_data()))
