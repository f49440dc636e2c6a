"""The pipeline: from a network and a recipe to a file, and the search for a budget."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from spread import assert_above, assert_below
from torch import nn

from lib import advice, repair, search
from lib import masks as masking
from lib.codec import Compressed
from lib.compress import compress, encode, prepare, remove
from lib.finetune import evaluate
from lib.fold import fold_batchnorm
from lib.prune import KeepTop, NonPositive
from lib.quantize import RateDistortion, Sequential, Tiers, Uniform
from lib.recipe import RECIPES, Recipe, Repair
from lib.relevance import scored_weights, weight_relevance
from study.networks import build

pytestmark = pytest.mark.filterwarnings("ignore:compression took:UserWarning")
LRP = "lrp-epsilon/contrastive"


def brief(recipe):
    """At most two rounds and two steps."""
    rule, how = recipe.remove, recipe.repair
    rule = rule and replace(rule, rounds=min(rule.rounds, 2))
    return replace(recipe, remove=rule, repair=replace(how, finetune=min(how.finetune, 2)))


def missing(model, dense, images):
    """Mean squared error of the outputs."""
    with torch.no_grad():
        return float((model.eval()(images) - dense.eval()(images)).square().mean())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_a_file_that_loads_to_what_was_made(
    name, trained, digits, references, tmp_path
):
    recipe = brief(RECIPES[name])
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    compressed = compress(trained, *references, recipe, train=digits)
    size = compressed.save(tmp_path / "file")
    assert size == (tmp_path / "file").stat().st_size == compressed.nbytes
    floats = sum(4 * value.numel() for value in before.values())
    assert_below(size / floats, 0.4, f"file over floats, {name}")
    loaded = Compressed.load(tmp_path / "file").to_model(trained)
    assert loaded.state_dict().keys() == before.keys()
    made = compressed.to_model(trained).state_dict()
    assert all(torch.equal(value, made[key]) for key, value in loaded.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())
    assert not trained.training and all(p.requires_grad for p in trained.parameters())


@pytest.mark.parametrize("name", RECIPES)
def test_removed_weights_are_zero_from_the_mask_to_the_file(name, trained, digits, references):
    recipe = brief(RECIPES[name])
    removed = remove(trained, *references, recipe, digits)
    decoded = encode(prepare(removed, *references, recipe), recipe).state_dict()
    assert list(removed.masks) == list(scored_weights(trained))
    density = masking.density(removed.masks)
    if recipe.remove is None:
        assert density == 1
    else:
        assert_below(density, 0.9, f"density after {name}")
    for name, mask in removed.masks.items():
        assert (removed.network.get_parameter(name)[~mask] == 0).all()
        assert (decoded[name][~mask] == 0).all()


def test_eight_bits_without_pruning_keep_function_and_architecture(trained, references):
    recipe = Recipe(store=Uniform(8))
    loaded = compress(trained, *references, recipe).to_model(trained).eval()
    assert any(isinstance(module, nn.BatchNorm2d) for module in loaded.modules())
    expected, found = trained(references[0]), loaded(references[0])
    error = (found - expected).abs().max() / expected.abs().max()
    assert_below(error.item(), 0.05, "largest error of a logit over the largest logit")
    fresh = build("resnet8", seed=9).eval()
    again = compress(trained, *references, recipe).to_model(fresh)
    assert torch.equal(again(references[0]), found)


def test_each_round_scores_and_repairs_what_the_rounds_before_left(trained, references):
    images, labels = references
    recipe = Recipe(NonPositive(LRP, fraction=0.5, rounds=3), Repair(True, True))
    dense = network = fold_batchnorm(trained)
    masks = {name: torch.ones_like(w) > 0 for name, w in scored_weights(dense).items()}
    for _ in range(3):
        scores = weight_relevance(network, images, labels, start="contrastive")
        masks = masking.nonpositive(scores, 0.5, mask=masks)
        network = masking.apply(network, masks)
        network = repair.renormalise(dense, network, masks, images)
        network = repair.refit(dense, network, masks, images)
    found = remove(trained, images, labels, recipe)
    assert all(torch.equal(mask, masks[name]) for name, mask in found.masks.items())
    expected = network.state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in found.network.state_dict().items())


@pytest.mark.parametrize("rounds", [1, 2])
def test_refitted_networks_put_out_what_the_dense_one_does(rounds, trained, references):
    """And after the last round they do: refitting once more has nothing left to gain."""
    recipe = Recipe(NonPositive(LRP, fraction=0.5, rounds=rounds), Repair(refit=True))
    images, dense = references[0], fold_batchnorm(trained)
    removed = remove(trained, *references, recipe)
    error = missing(removed.network, dense, images)
    harm = missing(masking.apply(dense, removed.masks), dense, images)
    assert_below(error / harm, 0.05, f"error left of pruning's, rounds: {rounds}")
    again = repair.refit(dense, removed.network, removed.masks, images)
    change = missing(again, dense, images) / error - 1
    assert_below(abs(change), 0.1, f"change of the error by another refit, rounds: {rounds}")


def test_fine_tuning_trains_what_was_kept_and_nothing_else(trained, digits, references):
    recipe = Recipe(NonPositive(LRP), Repair(finetune=5))
    plain = remove(trained, *references, replace(recipe, repair=Repair()))
    tuned = remove(trained, *references, recipe, digits)
    for name, mask in tuned.masks.items():
        assert torch.equal(mask, plain.masks[name])
        weight = tuned.network.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert (weight != plain.network.get_parameter(name)).any()


def test_the_default_is_the_best_recipe_without_training(trained, references):
    file = compress(trained, *references)
    assert file.to_bytes() == compress(trained, *references, "lrp-sequential").to_bytes()
    assert RECIPES["lrp-sequential"] == Recipe(store=Sequential(f"root:{LRP}"))
    literal = compress(trained, *references, "lrp-paper")
    assert (
        literal.to_bytes()
        == compress(
            trained, *references, Recipe(NonPositive("lrp-epsilon"), store=Tiers("lrp-epsilon"))
        ).to_bytes()
    )


def test_a_ruined_network_is_warned_of(trained, references):
    before = evaluate(trained, *references)
    told = f"took the accuracy .* from {before:.1f} to .*gentler"
    with pytest.warns(UserWarning, match=told) as seen:
        file = compress(trained, *references, "lrp-paper")
    assert seen[0].filename == __file__
    lost = before - evaluate(file.to_model(trained), *references)
    assert_above(lost, advice.LOST, "points that the literal rule loses")


def test_a_model_near_chance_is_warned_of(references):
    with pytest.warns(UserWarning, match="near chance on the reference images") as seen:
        compress(build("lenet300"), *references, "uniform")
    assert len(seen) == 1 and seen[0].filename == __file__


def test_a_sound_result_is_silent(trained, references):
    images, labels = references
    one_class = images[labels == 3], labels[labels == 3]
    for data, store in (
        (references, RateDistortion(price=1e-3)),
        (references, Uniform()),
        (one_class, Uniform(8)),  # chance is all there is
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            file = compress(trained, *data, Recipe(store=store))
        lost = evaluate(trained, *data) - evaluate(file.to_model(trained), *data)
        kind = f"{type(store).__name__}, {len(data[1])} images"
        assert_below(lost, advice.LOST, f"points that a sound file loses, {kind}")


@pytest.mark.parametrize("name", ["lrp-rd", "lrp-gradual", "deeplift-baseline", "uniform"])
@pytest.mark.parametrize("budget", [{"bits": 4.5}, {"bits": 3}, {"ratio": 9}])
def test_budgets_hold_for_the_real_file(name, budget, made, trained, references, tmp_path):
    """And leave a tenth of it only where the next setting of the knob needs more."""
    recipe = RECIPES[name]
    if recipe.remove:
        recipe = replace(recipe, remove=replace(recipe.remove, rounds=1))
    size = compress(trained, *references, recipe, **budget).save(tmp_path / "file")
    weights = sum(p.numel() for p in trained.parameters() if p.ndim > 1)
    floats = sum(4 * value.numel() for value in trained.state_dict().values())
    most = weights * budget["bits"] / 8 if "bits" in budget else floats / budget["ratio"]
    assert size <= most
    if size < (1 - search.FAR) * most:
        settings = recipe.store.settings
        found = min(settings.index(value) for value, file in made if file.nbytes == size)
        finer = recipe.at(settings[found - 1])
        assert compress(trained, *references, finer).nbytes > most


@pytest.mark.filterwarnings("ignore:the model itself")
def test_unscored_layers_are_stored_exactly(references):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(2704, 10)
    ).eval()
    nn.init.normal_(model[1].weight)
    loaded = compress(model, *references, "lrp-rd").to_model(model)
    assert torch.equal(loaded[1].weight, model[1].weight)
    assert not torch.equal(loaded[0].weight, model[0].weight)


@pytest.mark.filterwarnings("ignore:the model itself")
def test_biases_beyond_float16_stay_float32(references):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.ReLU(), nn.Linear(4, 10))
    with torch.no_grad():
        model[1].bias.fill_(0.1), model[3].bias[0].fill_(1e6)
    entries = compress(model, *references, Recipe(store=Uniform(8)))
    assert entries["1.bias"].dtype == torch.float16 and entries["3.bias"].dtype == torch.float32
    assert float(entries["3.bias"][0]) == pytest.approx(1e6, rel=1e-5)


def test_the_model_may_be_in_training_mode_and_stays_as_it_is(trained, references):
    model = copy.deepcopy(trained).train()
    state = copy.deepcopy(model.state_dict())
    recipe = Recipe(KeepTop(LRP), Repair(True, True))
    file = compress(model, *references, recipe)
    assert file.to_bytes() == compress(trained, *references, recipe).to_bytes()
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


class Parallel(nn.Module):
    """One layer is called twice, another through its weight, a third reads a constant."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.Linear(8, 8), nn.Linear(8, 8)
        self.aside, self.still, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.twice(self.twice(self.first(x)).relu())
        return self.last(h + h @ self.aside.weight.T + self.still(torch.ones_like(h)))


@pytest.mark.parametrize("recipe", ["lrp-sequential", "lrp-rd", "lrp-gradual-rd"])
def test_warnings_point_at_the_line_that_asked(recipe):
    torch.manual_seed(0)
    images, labels = torch.randn(30, 8), torch.arange(30) % 3
    with pytest.warns(UserWarning) as seen:
        compress(Parallel().eval(), images, labels, recipe, bits=10)
    said = " ".join(str(warning.message) for warning in seen)
    assert "eight bits at any price" in said and "cannot tell how the inputs" in said
    assert {warning.filename for warning in seen} == {__file__}
