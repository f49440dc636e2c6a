"""BatchNorm folded into the layer before it, wherever that leaves the function as it is."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lib.batchnorm import batchnorm_pairs
from lib.codec import Constant
from lib.fold import fold, fold_batchnorm
from study.networks import NETWORKS, build


def _settle(model):
    """Give BatchNorms statistics and gains that folding can get wrong."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                nn.init.normal_(module.weight, generator=generator)
                nn.init.normal_(module.bias, generator=generator)
    return model.double().eval()


@pytest.mark.parametrize("name, count", [("resnet8", 7), ("resnet20", 19), ("vgg16", 13)])
def test_folding_keeps_the_function_and_removes_every_batchnorm(name, count):
    model = _settle(build(name))
    images = torch.randn(2, NETWORKS[name].channels, 32, 32, dtype=torch.float64)
    folded = fold_batchnorm(model)
    assert len(batchnorm_pairs(model)) == count
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert torch.allclose(folded(images), model(images), rtol=1e-9, atol=1e-9)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    weights = {key for key, p in model.named_parameters() if p.ndim > 1}
    assert weights <= {key for key, _ in folded.named_parameters()}


def test_folding_covers_linear_transposed_and_plain_batchnorm():
    model = _settle(
        nn.Sequential(
            *(nn.ConvTranspose2d(2, 4, 3), nn.BatchNorm2d(4, affine=False)),
            *(nn.Flatten(), nn.Linear(100, 6, bias=False), nn.BatchNorm1d(6)),
        )
    )
    images = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    assert batchnorm_pairs(model) == {"1": "0", "4": "3"}
    assert torch.allclose(fold_batchnorm(model)(images), model(images), atol=1e-9)


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class _Branching(_Twice):
    def forward(self, x):
        return self.norm(self.conv(x)) if x.sum() > 0 else x


@pytest.mark.parametrize(
    "model",
    [
        _Twice(),
        _Branching(),
        nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1)),
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)),
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.BatchNorm2d(2)),
        nn.Sequential(nn.ConvTranspose2d(2, 2, 1, groups=2), nn.BatchNorm2d(2)),
    ],
    ids=["read twice", "data-dependent", "before", "no statistics", "behind ReLU", "groups"],
)
def test_batchnorm_that_cannot_be_folded_stays(model):
    assert batchnorm_pairs(model) == {}
    images = torch.rand(2, 2, 3, 3)
    assert torch.allclose(fold_batchnorm(model)(images), model.eval()(images))


def test_sequential_neighbours_fold_where_tracing_fails():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)), _Branching())
    assert batchnorm_pairs(model) == {"0.1": "0.0"}


def test_without_batchnorm_nothing_is_traced():
    class Untouchable(nn.Linear):
        def forward(self, x):
            raise AssertionError("called")

    model = nn.Sequential(Untouchable(2, 2)).train()
    folded = fold(model, torch.rand(3, 2))
    assert folded.pairs == {} and folded.model is model
    assert folded.network is not model and not folded.network.training and model.training


class _Remembering(nn.Sequential):
    """Keeps what it computed last, as networks do whose features are looked at."""

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


def test_tracing_leaves_the_model_as_it_was():
    model = _settle(_Remembering(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)))
    images = torch.rand(2, 2, 3, 3, dtype=torch.float64)
    folded = fold(model, images)
    assert folded.pairs == {"1": "0"}
    assert not hasattr(model, "last") and not hasattr(folded.network, "last")
    assert torch.equal(copy.deepcopy(model)(images), model(images))


def _other_axis():
    """A linear layer of the last axis, and a BatchNorm of the equally long axis before it."""
    return _settle(
        nn.Sequential(
            *(nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4), nn.Linear(5, 4), nn.BatchNorm1d(4)),
            *(nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6)),
        )
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_images_show_a_batchnorm_of_another_axis(dtype):
    model, images = _other_axis().to(dtype), torch.randn(3, 2, 5).to(dtype)
    assert batchnorm_pairs(model) == {"1": "0", "3": "2", "6": "5"}
    folded = fold(model, images)
    # without images, a linear layer is folded only where its outputs have one axis
    assert folded.pairs == fold(model).pairs == {"1": "0", "6": "5"}
    assert isinstance(folded.network[3], nn.BatchNorm1d)
    near = 1e-9 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 0.1
    expected = model(images)
    for network in (folded.network, fold_batchnorm(model)):
        found = network(images.to(next(network.parameters()).dtype))
        assert (found - expected).abs().max() < near * expected.abs().max()


def test_batchnorm_of_another_length_stays():
    model = _settle(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(3), nn.Flatten()))
    images = torch.randn(2, 3, 5, dtype=torch.float64)
    assert batchnorm_pairs(model) == {}
    assert torch.equal(fold_batchnorm(model)(images), model(images))


@pytest.mark.parametrize(
    "convolution",
    [
        lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 1)),
        lambda: parametrizations.orthogonal(nn.Conv2d(2, 3, 1)),
        lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 1), "bias", dim=None),
        lambda: prune.random_unstructured(nn.Conv2d(2, 3, 1), "weight", 0.5),
    ],
    ids=["weight norm", "orthogonal", "bias", "pruned"],
)
@pytest.mark.parametrize("compared", [False, True])
def test_a_computed_parameter_is_never_folded(convolution, compared):
    model = _settle(nn.Sequential(convolution(), nn.BatchNorm2d(3)))
    images = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        model(images)  # which lets hooks set the weight to a tensor that can be copied
    folded = fold(model, images if compared else None)
    assert folded.pairs == {}
    assert torch.equal(folded.network(images), model(images))


class _Tied(nn.Module):
    """Cannot be traced; one convolution stands in two places, or its weight in two layers."""

    def __init__(self, module):
        super().__init__()
        first, second = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        second.weight = first.weight
        second = first if module else second
        self.first = nn.Sequential(first, nn.BatchNorm2d(2))
        self.second = nn.Sequential(second, nn.BatchNorm2d(2))

    def forward(self, x):
        return self.second(self.first(x)) if x.sum() > 0 else x


@pytest.mark.parametrize("module", [False, True])
def test_what_is_shared_is_never_folded(module):
    model = _settle(_Tied(module))
    images = torch.rand(2, 2, 3, 3, dtype=torch.float64)
    assert batchnorm_pairs(model) == {}
    assert torch.equal(fold_batchnorm(model)(images), model(images))


@pytest.mark.parametrize("name", ["resnet8", "vgg16"])
def test_scales_are_what_folding_multiplied_weights_by(name):
    folded = fold(_settle(build(name)))
    scales = folded.scales()
    assert scales.keys() == {n for n, p in folded.model.named_parameters() if p.ndim > 1}
    for norm_path, layer_path in folded.pairs.items():
        norm = folded.model.get_submodule(norm_path)
        gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).abs().detach()
        scale = scales.pop(f"{layer_path}.weight")
        torch.testing.assert_close(scale, gain.view(-1, 1, 1, 1).expand_as(scale))
    assert scales and all(torch.equal(s, torch.ones_like(s)) for s in scales.values())


def test_weights_that_are_zero_have_no_scale():
    model = _settle(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    with torch.no_grad():
        model[0].weight[0] = 0
        model[1].weight[1] = 0
    assert torch.equal(fold(model).scales()["0.weight"], torch.ones(2, 3).double())


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_unfolding_gives_the_model_what_the_folded_network_does(affine, bias):
    model = _settle(
        nn.Sequential(
            *(nn.Conv2d(2, 3, 1, bias=bias), nn.BatchNorm2d(3, affine=affine), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(27, 4)),
        )
    )
    images = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    folded = fold(model)
    entries = folded.unfold(folded.network.state_dict())
    assert list(entries) == list(model.state_dict())
    assert isinstance(entries["1.running_var"], Constant)
    state = {n: e.decode() if isinstance(e, Constant) else e for n, e in entries.items()}
    for name, value in model.state_dict().items():
        assert state[name].shape == value.shape and state[name].dtype == value.dtype
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    torch.testing.assert_close(other(images), folded.network(images), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other(images), model(images), rtol=1e-9, atol=1e-9)
