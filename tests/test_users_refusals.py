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


def _sparse():
    model = _net()
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse())
    return model


def _one_memory():
    model = nn.Sequential(*_net(), nn.Linear(20, 16))
    model[3].weight = nn.Parameter(model[0].weight.detach())
    return model


def _orthogonal():
    model = _net()
    nn.utils.parametrizations.orthogonal(model[0])
    return model


def _warped(n, x):
    grid = F.affine_grid(n(x).repeat(1, 2)[:, :6].view(-1, 2, 3), (len(x), 1, 4, 5))
    return n(F.grid_sample(x.view(-1, 1, 4, 5), grid).flatten(1))


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
    "meta": (lambda: _net().to("meta"), "'0.weight' is on the meta device"),
    "sparse": (_sparse, r"'0.weight' is sparse.*to_dense\(\)"),
    "one memory": (_one_memory, "'0.weight' and '3.weight' lie in one memory.*one parameter"),
    "vmap": (lambda: Around(lambda n, x: torch.vmap(n)(x)), "'linear' inside torch.func.*a loop"),
    "orthogonal": (_orthogonal, r"remove_parametrizations\(model.0, 'weight'\) first"),
    "exponential": (lambda: Around(lambda n, x: n(x).exp()), "'exp'.*softmax"),
    "spatial transformer": (lambda: Around(_warped), "'affine_grid'.*computes the grid separately"),
    "empty layer": (lambda: nn.Sequential(*_net(), nn.Linear(4, 0)), "'3.weight' has no elements"),
    "shape in place": (
        lambda: Around(lambda n, x: n(x * 1).unsqueeze_(0)[0]),
        r"a change of shape in place.*write x = x.unsqueeze\(0\)",
    ),
    "no network": (lambda: None, "must be a torch.nn.Module, not a NoneType"),
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
    "meta": (lambda x, y: (x.to("meta"), y), "images are on the meta device"),
    "column": (lambda x, y: (x, y[:, None]), r"labels.flatten\(\)"),
    "complex": (lambda x, y: (x.to(torch.complex64), y), "images are complex: .*channels"),
}


@pytest.mark.parametrize("name", DATA)
def test_unusable_data_name_the_remedy(name):
    for call in CALLS:
        with pytest.raises(ValueError, match=DATA[name][1]):
            call(_net(), *DATA[name][0](*_data()))


def test_an_output_that_does_not_fit_says_what_the_model_returns():
    for output in (lambda o: o.logits, lambda o: o["logits"]):
        for call in CALLS:
            with pytest.raises(ValueError, match=r"output= cannot take .* a Tensor \[\d+, 4\]: "):
                call(_net(), *_data(), output=output)


def test_options_of_another_kind_are_named():
    for call in CALLS[1:]:
        with pytest.raises(ValueError, match="batch_size must be a whole number.*1.5"):
            call(_net(), *_data(), batch_size=1.5)
    for call in CALLS:
        with pytest.raises(ValueError, match="output must be a function.*'logits'"):
            call(_net(), *_data(), output="logits")


VALIDATION = {
    "array": (lambda x, y: (x.numpy(), y), "val: images must be a torch.Tensor"),
    "one-hot": (lambda x, y: (x, F.one_hot(y, 4)), r"val: .*one-hot.*labels.argmax\(1\)"),
    "fewer labels": (lambda x, y: (x, y[1:]), "val: 60 images but labels of shape"),
    "dict": (lambda x, y: {"images": x}, "val must be .*not a dict"),
}


@pytest.mark.parametrize("name", VALIDATION)
def test_validation_data_are_checked_before_long_work(name):
    change, message = VALIDATION[name]
    with pytest.raises(ValueError, match=message):
        compress(_net(), *_data(), val=change(*_data()), max_drop=1)


def test_a_kernel_of_a_convolution_and_a_transposed_one_has_no_units():
    class Tied(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.c, self.o = nn.Conv2d(channels, 4, 3, padding=1), nn.Linear(channels * 16, 4)

        def forward(self, x):
            h = F.relu(self.c(x))
            return self.o(F.conv_transpose2d(h, self.c.weight, padding=1).flatten(1))

    for channels in (3, 4):  # units as many as inputs: only their meaning differs
        torch.manual_seed(0)
        model, x = Tied(channels), torch.randn(12, channels, 4, 4)
        for call in (unit_sensitivity, compress):
            with pytest.raises(UnsupportedLayerError, match="'c.weight'.*a transposed one"):
                call(model, x, torch.arange(12) % 4)
        assert weight_relevance(model, x, torch.arange(12) % 4)["c.weight"].any()


def test_a_file_goes_into_a_network_and_nothing_else():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = compress(_net(), *_data())
    for other in (None, "model.pt", nn.Linear, _net().state_dict()):
        with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module"):
            small.to_model(other)
