import pytest
import torch
from torch import nn

from lib.models import MODELS, batchnorm_pairs, build, fold_batchnorm


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


@pytest.mark.parametrize(
    "name, weights",
    [("lenet300", 266_200), ("lenet5", 430_500), ("resnet20", 268_336), ("vgg16", 14_715_584)],
)
def test_networks_have_the_known_number_of_weights(name, weights):
    model = build(name)
    assert sum(p.numel() for p in model.parameters() if p.ndim > 1) == weights


@pytest.mark.parametrize("name", MODELS)
def test_networks_give_ten_logits_and_are_seeded(name):
    size = 28 if MODELS[name][1] == 1 else 32
    images = torch.randn(2, MODELS[name][1], size, size)
    before = torch.random.get_rng_state()
    model = build(name, seed=4).eval()
    assert torch.equal(before, torch.random.get_rng_state())
    assert model(images).shape == (2, 10)
    assert torch.equal(model(images), build(name, seed=4).eval()(images))
    assert not torch.equal(model(images), build(name, seed=5).eval()(images))


def test_unknown_network_lists_the_known():
    with pytest.raises(ValueError, match="unknown model 'lenet'; known: .*lenet5"):
        build("lenet")


@pytest.mark.parametrize("name, count", [("resnet8", 7), ("resnet20", 19), ("vgg16", 13)])
def test_folding_keeps_the_function_and_removes_every_batchnorm(name, count):
    model = _settle(build(name))
    images = torch.randn(2, MODELS[name][1], 32, 32, dtype=torch.float64)
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
