import pytest
import torch

from study.networks import NETWORKS, Network, build


@pytest.mark.parametrize(
    "name, weights",
    [("lenet300", 266_200), ("lenet5", 430_500), ("resnet20", 268_336), ("vgg16", 14_715_584)],
)
def test_networks_have_the_known_number_of_weights(name, weights):
    model = build(name)
    assert sum(p.numel() for p in model.parameters() if p.ndim > 1) == weights


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_give_ten_logits_and_are_seeded(name):
    size = 28 if NETWORKS[name].channels == 1 else 32
    images = torch.randn(2, NETWORKS[name].channels, size, size)
    before = torch.random.get_rng_state()
    model = build(name, seed=4).eval()
    assert torch.equal(before, torch.random.get_rng_state())
    assert model(images).shape == (2, 10)
    assert torch.equal(model(images), build(name, seed=4).eval()(images))
    assert not torch.equal(model(images), build(name, seed=5).eval()(images))


def test_unknown_network_lists_the_known():
    with pytest.raises(ValueError, match="unknown model 'lenet'; known: .*lenet5"):
        build("lenet")


def test_a_network_from_outside_is_one_line(monkeypatch):
    def make(classes, channels):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4 * channels, classes))

    monkeypatch.setitem(NETWORKS, "mine", Network(make, channels=2))
    assert build("mine", classes=3)(torch.zeros(5, 2, 2, 2)).shape == (5, 3)
