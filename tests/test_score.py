"""Criteria by name and by object, what wrappers do to them, and what follows for units."""

import copy

import pytest
import torch
from spread import assert_above
from torch import nn

from lib.baselines import magnitude
from lib.compress import compress, remove
from lib.fold import fold, fold_batchnorm
from lib.prune import KeepTop, Removed
from lib.quantize import RateDistortion
from lib.recipe import Recipe
from lib.relevance import scored_weights, unit_sensitivity, weight_relevance
from lib.score import CRITERIA, WRAPPERS, Criterion, criterion, weight_times_gradient
from study.networks import build

pytestmark = pytest.mark.filterwarnings("ignore:compression took:UserWarning")


def near(scores, expected, tolerance=1e-9):
    assert list(scores) == list(expected)
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=tolerance, atol=1e-12)


def pooled(values):
    return torch.cat([value.flatten() for value in values.values()])


@pytest.fixture(scope="module")
def network(trained, references):
    return fold_batchnorm(trained), *references


@pytest.mark.parametrize(
    "name",
    [*CRITERIA, "reversed:lrp-zplus/contrastive/abs", "lrp-0/rms", "root:fisher", "shuffled:lrp-0"],
)
def test_scores_are_like_weights_repeat_and_leave_the_model_alone(name, problem):
    model, images, labels = problem
    state = copy.deepcopy(model.state_dict())
    first, second = (CRITERIA[name](model, images, labels) for _ in range(2))
    weights = scored_weights(model)
    assert list(first) == list(weights)
    for key, score in first.items():
        assert score.shape == weights[key].shape and score.dtype == weights[key].dtype
        assert score.isfinite().all() and not score.requires_grad
        assert torch.equal(score, second[key])
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "name", sorted({*CRITERIA} - {"magnitude", "magnitude-folded", "random", "alike"})
)
def test_bad_data_are_refused(name, problem):
    model, images, labels = problem
    for x, y in (
        (images[:0], labels[:0]),
        (images, labels[:3]),
        (images, labels + 4),
        (images * torch.nan, labels),
    ):
        with pytest.raises(ValueError):
            CRITERIA[name](model, x, y)


def test_names():
    for name in ("epsilon", "lrp", "lrp-", "lrp-epsilon/sum/abs", "lrp-zplus/abs/contrastive",
                 "reversed:nothing", "Magnitude", "rot:fisher", "root:", ":fisher"):  # fmt: skip
        with pytest.raises(ValueError, match="magnitude"):
            CRITERIA[name]
        assert name not in CRITERIA and CRITERIA.get(name) is None
    assert "lrp-epsilon-plus-flat/softmax-gradient/rms" in CRITERIA
    assert len(CRITERIA) == len(set(CRITERIA))


def test_relevance_by_name_has_its_rule_start_and_aggregate(problem):
    scores = CRITERIA["lrp-gamma/contrastive/abs"](*problem)
    near(scores, weight_relevance(*problem, rule="gamma", start="contrastive", aggregate="abs"))
    near(
        CRITERIA["lrp-zplus/rms"](*problem),
        weight_relevance(*problem, rule="zplus", aggregate="rms"),
    )
    negated = CRITERIA["reversed:lrp-epsilon"](*problem)
    near({n: -s for n, s in negated.items()}, weight_relevance(*problem))


@pytest.mark.parametrize("make", ["lenet5", "resnet8"])
def test_on_relu_networks_lrp_epsilon_is_weight_times_gradient(make, references):
    """Rounding differs: in float64 by 1e-13 of a layer's largest score, in float32 by 1e-6."""
    model = build(make)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(0))
    simple, general = (
        by(model, *references) for by in (weight_times_gradient, CRITERIA["lrp-epsilon"])
    )
    assert list(simple) == list(general) == list(scored_weights(model))
    for name, score in simple.items():
        assert score.abs().max() > 0
        assert (general[name] - score).abs().max() < 1e-5 * score.abs().max()


@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh])
def test_elsewhere_it_is_not(activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), activation(), nn.Linear(30, 5))
    data = torch.randn(40, 20), torch.arange(40) % 5
    simple, general = weight_times_gradient(model, *data), CRITERIA["lrp-epsilon"](model, *data)
    first, last = ((general[n] - s).norm() / s.norm() for n, s in simple.items())
    assert first > 0.1 and last < 1e-5  # behind the activation the two are still one


def test_weight_times_gradient_runs_without_gradients_and_in_inference_mode(problem):
    expected = weight_times_gradient(*problem)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            near(weight_times_gradient(*problem), expected)


@pytest.mark.parametrize("kind", ["scores", "units"])
@pytest.mark.parametrize("name", ["lrp-epsilon/contrastive", "fisher", "magnitude"])
def test_reversed_ranks_weights_and_units_the_other_way_around(name, kind, network):
    plain, back = (
        pooled(by(*network) if kind == "scores" else by.units(*network))
        for by in (CRITERIA[name], CRITERIA[f"reversed:{name}"])
    )
    assert torch.equal(back[plain.argsort()], back.sort(descending=True).values)
    assert back.unique().numel() == plain.unique().numel() > 20


def test_reversed_twice_is_the_criterion_itself(network):
    plain, twice = CRITERIA["magnitude"], CRITERIA["reversed:reversed:magnitude"]
    near(twice(*network), plain(*network), 0)
    near(twice.units(*network), plain.units(*network), 0)


@pytest.mark.parametrize("kind", ["scores", "units"])
def test_shuffled_deals_the_same_values_out_over_the_whole_network(kind, network):
    """A layer's share must not stay its own: else the control still knows which layers matter."""

    def by_layer(model, images, labels):
        layers = scored_weights(model)
        return {n: torch.full_like(w, i) for i, (n, w) in enumerate(layers.items())}

    def units_by_layer(*data):
        return {name: score.flatten(1)[:, 0] + 1 for name, score in by_layer(*data).items()}

    CRITERIA["mine"] = Criterion("mine", by_layer, unit_function=units_by_layer)
    try:
        plain, dealt = (
            by(*network) if kind == "scores" else by.units(*network)
            for by in (CRITERIA["mine"], CRITERIA["shuffled:mine"])
        )
    finally:
        del CRITERIA["mine"]
    assert torch.equal(pooled(plain).sort().values, pooled(dealt).sort().values)
    for name, value in dealt.items():
        assert value.shape == plain[name].shape
        assert value.unique().numel() > 1 == plain[name].unique().numel()


def test_controls_deal_out_the_same_values(network):
    plain, shuffled, back = (
        pooled(CRITERIA[f"{prefix}lrp-epsilon"].units(*network))
        for prefix in ("", "shuffled:", "reversed:")
    )
    for control in (shuffled, back):
        assert torch.equal(control.sort().values, plain.sort().values)
        assert not torch.equal(control, plain)
    order = plain.argsort()
    assert torch.equal(back[order], plain.sort(descending=True).values)


def test_roots_are_half_way_to_units_alike(network):
    plain, root, both = (
        pooled(CRITERIA[f"{prefix}lrp-epsilon"].units(*network))
        for prefix in ("", "root:", "shuffled:root:")
    )
    some = plain > 0
    assert torch.allclose(root[some].square() / plain[some], root.mean() / plain.sqrt().mean() ** 2)
    assert torch.equal(root > 0, some)
    assert torch.equal(both.sort().values, root.sort().values) and not torch.equal(both, root)


def test_roots_of_scores_keep_sign_and_order(network):
    plain, root = (pooled(CRITERIA[name](*network)) for name in ("lrp-0", "root:lrp-0"))
    torch.testing.assert_close(root * root.abs(), plain)
    assert (root[plain.argsort()].diff() >= 0).all()


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_wrappers_change_the_score_of_the_weight_as_trained(wrapper, name, trained, references):
    """The gain of a folded BatchNorm is divided out before, not after, values are moved."""
    folded = fold(trained, references[0])
    masks = {n: torch.ones_like(w) > 0 for n, w in scored_weights(folded.network).items()}
    removed = Removed(folded, folded.network, masks)
    plain, changed = (removed.scores(by, *references) for by in (name, f"{wrapper}:{name}"))
    torch.testing.assert_close(pooled(changed), WRAPPERS[wrapper].scores(pooled(plain)))
    assert not torch.allclose(pooled(plain), pooled(CRITERIA[name](folded.network, *references)))


def test_only_scores_of_weights_as_trained_have_the_gain_divided_out(trained, references):
    folded = fold(trained, references[0])
    removed = Removed(folded, folded.network, {})
    for name in ("lrp-epsilon", "magnitude-folded", "fisher"):
        scores = removed.scores(name, *references)
        near(scores, CRITERIA[name](folded.network, *references), 0)
    for name, score in removed.scores("magnitude", *references).items():
        torch.testing.assert_close(score, trained.get_parameter(name).detach().abs())


def test_units_by_relevance_are_its_mean_square_normalised(network):
    found = CRITERIA["lrp-epsilon/contrastive"].units(*network)
    direct = unit_sensitivity(*network, start="contrastive")
    scale = torch.cat(list(direct.values())).mean()
    for name, unit in found.items():
        assert torch.allclose(unit, direct[name] / scale, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["lrp-zplus", "fisher", "magnitude", "alike", "shuffled:lrp-0", "root:fisher"]
)
def test_units_have_mean_one_and_one_value_each(name, network):
    units = CRITERIA[name].units(*network)
    assert abs(pooled(units).mean() - 1) < 1e-4 and (pooled(units) >= 0).all()
    assert all(len(u) == len(network[0].get_parameter(key)) for key, u in units.items())


@pytest.mark.parametrize("name", ["lrp-epsilon/contrastive", "fisher"])
def test_layers_that_matter_more_have_heavier_units(name, network):
    """Normalised over the network: layer by layer, a trade-off could not tell layers apart."""
    means = [float(unit.mean()) for unit in CRITERIA[name].units(*network).values()]
    assert_above(max(means) / min(means), 3, f"heaviest layer over the lightest, {name}")


def test_fisher_units_are_squared_gradients_of_the_loss(references):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 6), nn.ReLU(), nn.Linear(6, 10)).eval()
    # Exact for one sample; over many, squares of inputs and of gradients correlate.
    images, labels = references[0][:1], references[1][:1]
    units = CRITERIA["fisher"].units(model, images, labels)
    gradient = model(images).softmax(1) - nn.functional.one_hot(labels, 10)
    expected = gradient.detach().square()[0]
    found = units["3.weight"]
    assert torch.allclose(found / found.sum(), expected / expected.sum(), rtol=1e-3)


@pytest.mark.parametrize("order", [1, 2])
def test_units_that_follow_from_scores_are_of_second_order(order, network):
    """Twice the score is four times the weight of a unit, or twice, by the criterion's order."""
    first = next(iter(scored_weights(network[0])))

    def doubled(*data):
        scores = magnitude(*data)
        scores[first][0] *= 2
        return scores

    plain, other = (Criterion("", f, order).units(*network)[first] for f in (magnitude, doubled))
    ratio = (other[0] / other[1]) / (plain[0] / plain[1])
    assert float(ratio) == pytest.approx(4 / order, rel=1e-4)


def test_a_criterion_is_found_by_its_name_and_taken_as_it_is(network):
    mine = Criterion("mine", magnitude)
    assert criterion(mine) is mine and criterion("fisher") is CRITERIA["fisher"]
    CRITERIA["mine"] = mine
    try:
        assert criterion("mine") is mine and "mine" in CRITERIA and "root:mine" in CRITERIA
        assert "mine" in list(CRITERIA)
    finally:
        del CRITERIA["mine"]
    assert "mine" not in CRITERIA
    for name in ("", "a:b", "a/b", "lrp-mine"):
        with pytest.raises(ValueError, match="cannot name a criterion"):
            CRITERIA[name] = mine
    with pytest.raises(TypeError, match="must be a Criterion"):
        CRITERIA["mine"] = magnitude


def test_a_criterion_of_ones_own_ranks_and_weighs(trained, references, tmp_path):
    """Ten lines to a file: only the first layer matters, for what is kept and for how exactly."""

    def score(model, images, labels):
        weights = scored_weights(model).values()
        return {
            name: w.detach().abs() * (w is next(iter(weights)))
            for name, w in scored_weights(model).items()
        }

    mine = Criterion("first-layer", score)
    recipe = Recipe(KeepTop(mine, density=0.2), store=RateDistortion(mine, price=0.1))
    size = compress(trained, *references, recipe).save(tmp_path / "file")
    assert 0 < size == (tmp_path / "file").stat().st_size
    masks = remove(trained, *references, recipe).masks
    first, *others = masks.values()
    assert first.all() and sum(int(mask.sum()) for mask in others) > 0
    units = list(mine.units(fold_batchnorm(trained), *references).values())
    assert units[0].min() > 0 and not any(unit.any() for unit in units[1:])
