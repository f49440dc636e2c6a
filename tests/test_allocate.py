import pytest
import torch
from torch import nn

from lib.allocate import tier_shares, unit_weights
from lib.models import fold_batchnorm
from lib.relevance import unit_sensitivity


def _scores(*shapes):
    generator = torch.Generator().manual_seed(0)
    return {str(i): torch.randn(s, generator=generator) for i, s in enumerate(shapes)}


@pytest.mark.parametrize("mean", [2.5, 4.0, 6.0])
def test_tier_shares_have_the_mean_and_rank_globally(mean):
    scores = _scores((40, 50), (30, 20))
    scores["1"] += 1.0
    masks = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    shares = tier_shares(scores, masks, (0, 2, 4, 8), mean)
    total = sum(score.numel() for score in scores.values())
    widths = torch.tensor([0.0, 2, 4, 8], dtype=torch.float64)
    found = sum(
        float(torch.tensor(shares[name]).double() @ widths) * score.numel() / total
        for name, score in scores.items()
    )
    assert abs(found - mean) < 0.02
    assert all(abs(sum(share) - 1) < 1e-6 and share[0] == 0 for share in shares.values())
    assert shares["1"][3] > shares["0"][3] and shares["1"][1] < shares["0"][1]


def test_flattest_shares_at_the_middle_are_equal():
    scores = _scores((300, 100))
    masks = {"0": torch.ones(300, 100, dtype=torch.bool)}
    shares = tier_shares(scores, masks, (0, 2, 4, 6), 4.0)["0"]
    assert shares == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], abs=1e-3)


def test_removed_weights_do_not_count():
    scores = _scores((10, 10))
    kept = scores["0"] > 0
    shares = tier_shares(scores, {"0": kept}, (0, 2, 8), 5.0)["0"]
    assert abs(shares[1] - 0.5) < 0.02 and abs(shares[2] - 0.5) < 0.02


@pytest.fixture(scope="module")
def network(trained, references):
    return fold_batchnorm(trained), *references


def test_units_by_relevance_are_its_mean_square_normalised(network):
    found = unit_weights("lrp-epsilon/contrastive", *network)
    direct = unit_sensitivity(*network, start="contrastive")
    scale = torch.cat(list(direct.values())).mean()
    for name, unit in found.items():
        assert torch.allclose(unit, direct[name] / scale, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["lrp-zplus", "fisher", "magnitude", "alike", "shuffled:lrp-0", "root:fisher"]
)
def test_units_have_mean_one_and_one_value_each(name, network):
    units = unit_weights(name, *network)
    pooled = torch.cat(list(units.values()))
    assert abs(pooled.mean() - 1) < 1e-4 and (pooled >= 0).all()
    assert all(len(u) == len(network[0].get_parameter(key)) for key, u in units.items())


def test_controls_deal_out_the_same_values(network):
    plain, shuffled, back = (
        torch.cat(list(unit_weights(f"{prefix}lrp-epsilon", *network).values()))
        for prefix in ("", "shuffled:", "reversed:")
    )
    for control in (shuffled, back):
        assert torch.equal(control.sort().values, plain.sort().values)
        assert not torch.equal(control, plain)
    order = plain.argsort()
    assert torch.equal(back[order], plain.sort(descending=True).values)


def test_roots_are_half_way_to_units_alike(network):
    plain, root, both = (
        torch.cat(list(unit_weights(f"{prefix}lrp-epsilon", *network).values()))
        for prefix in ("", "root:", "shuffled:root:")
    )
    some = plain > 0
    assert torch.allclose(root[some].square() / plain[some], root.mean() / plain.sqrt().mean() ** 2)
    assert torch.equal(root > 0, some)
    assert torch.equal(both.sort().values, root.sort().values) and not torch.equal(both, root)


def test_fisher_units_are_squared_gradients_of_the_loss(references):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 6), nn.ReLU(), nn.Linear(6, 10)).eval()
    # Exact for one sample; over many, squares of inputs and of gradients correlate.
    images, labels = references[0][:1], references[1][:1]
    units = unit_weights("fisher", model, images, labels)
    gradient = model(images).softmax(1) - nn.functional.one_hot(labels, 10)
    expected = gradient.detach().square()[0]
    found = units["3.weight"]
    assert torch.allclose(found / found.sum(), expected / expected.sum(), rtol=1e-3)
