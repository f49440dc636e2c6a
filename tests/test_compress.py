"""The pipeline: from a network and a recipe to a file, and the search for a budget."""

import copy
import warnings
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from lib import masks as masking
from lib import repair
from lib.codec import Compressed, CompressedFileError
from lib.compress import compress, encode, prepare, remove
from lib.fold import fold_batchnorm
from lib.prune import KeepTop, NonPositive
from lib.quantize import RateDistortion, Sequential, Tiers, Uniform
from lib.recipe import RECIPES, Recipe, Repair
from lib.relevance import UnsupportedLayerError, scored_weights, weight_relevance
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
    assert size < 0.4 * sum(4 * value.numel() for value in before.values())
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
    assert (masking.density(removed.masks) < 0.9) == (recipe.remove is not None)
    for name, mask in removed.masks.items():
        assert (removed.network.get_parameter(name)[~mask] == 0).all()
        assert (decoded[name][~mask] == 0).all()


def test_eight_bits_without_pruning_keep_function_and_architecture(trained, references):
    recipe = Recipe(store=Uniform(8))
    loaded = compress(trained, *references, recipe).to_model(trained).eval()
    assert any(isinstance(module, nn.BatchNorm2d) for module in loaded.modules())
    expected, found = trained(references[0]), loaded(references[0])
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
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
    assert error < 0.05 * missing(masking.apply(dense, removed.masks), dense, images)
    again = repair.refit(dense, removed.network, removed.masks, images)
    assert missing(again, dense, images) == pytest.approx(error, rel=0.1)


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
    with pytest.warns(UserWarning, match="took the accuracy .* from 8.* to .*gentler") as seen:
        compress(trained, *references, "lrp-paper")
    assert seen[0].filename == __file__


def test_a_model_near_chance_is_warned_of(references):
    with pytest.warns(UserWarning, match="near chance on the reference images") as seen:
        compress(build("lenet300"), *references, "uniform")
    assert len(seen) == 1 and seen[0].filename == __file__


def test_a_sound_result_is_silent(trained, references):
    images, labels = references
    one_class = images[labels == 3], labels[labels == 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(trained, images, labels, Recipe(store=RateDistortion(price=1e-3)))
        compress(trained, images, labels, "uniform")
        compress(trained, *one_class, Recipe(store=Uniform(8)))  # chance is all there is


@pytest.mark.parametrize(
    ("name", "least"),
    # Only the knob of the first has no steps.
    [("lrp-rd", 0.93), ("lrp-gradual", 0.75), ("deeplift-baseline", 0.75), ("uniform", 0.75)],
)
@pytest.mark.parametrize("budget", [{"bits": 4.5}, {"bits": 3}, {"ratio": 9}])
def test_budgets_hold_for_the_real_file(name, least, budget, trained, references, tmp_path):
    recipe = RECIPES[name]
    if recipe.remove:
        recipe = replace(recipe, remove=replace(recipe.remove, rounds=1))
    size = compress(trained, *references, recipe, **budget).save(tmp_path / "file")
    weights = sum(p.numel() for p in trained.parameters() if p.ndim > 1)
    floats = sum(4 * value.numel() for value in trained.state_dict().values())
    most = weights * budget["bits"] / 8 if "bits" in budget else floats / budget["ratio"]
    assert least * most < size <= most


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"recipe": "lrp"}, "unknown recipe 'lrp'; known: .*lrp-paper"),
        ({"recipe": "lrp-paper-finetuned"}, "trains: give it train="),
        ({"bits": 3, "ratio": 9}, "one budget, not bits and ratio"),
        ({"bits": 0}, "bits must be a positive number"),
        ({"bits": float("nan")}, "bits must be a positive number"),
        ({"ratio": -1}, "ratio must be a positive number"),
        ({"ratio": float("inf")}, "ratio must be a positive number"),
        ({"ratio": "8"}, "ratio must be a number, not '8'"),
        ({"bits": True}, "bits must be a number, not True"),
        (
            {"train": (torch.zeros(2), torch.zeros(2), torch.zeros(2))},
            "train must be .*not 3 parts",
        ),
        ({"max_drop": 1.0}, "give val="),
        ({"max_drop": -1.0}, "max_drop must be a positive number"),
        ({"recipe": "lrp-rd", "ratio": 1e6}, "ratio=1e.06 cannot be met.*smallest file has"),
        ({"recipe": "uniform", "bits": 0.1}, "bits=0.1 cannot be met.*smallest file has"),
    ],
)
def test_unusable_arguments_name_the_way_out(arguments, message, trained, references):
    with pytest.raises(ValueError, match=message):
        compress(trained, *references, **arguments)


def test_unusable_images_labels_and_models(trained, references):
    images, labels = references
    for bad_images, bad_labels, message in [
        (images, labels + 5, "label"),
        (images * torch.nan, labels, "NaN|finite"),
        (images[:0], labels[:0], "empty|no "),
    ]:
        for recipe in ("lrp-sequential", "lrp-root-rd", "lrp-paper"):
            with pytest.raises(ValueError, match=message):
                compress(trained, bad_images, bad_labels, recipe)
    with pytest.raises(ValueError, match="the model has no linear, convolution"):
        compress(nn.Sequential(nn.Flatten(), nn.ReLU()), images, labels)
    with pytest.raises(UnsupportedLayerError, match="odd"):
        first, last = nn.Conv2d(1, 1, 1), nn.Linear(196, 10)
        odd = nn.FractionalMaxPool2d(2, output_size=14)
        layers = {"first": first, "odd": odd, "flat": nn.Flatten(), "last": last}
        compress(nn.Sequential(OrderedDict(layers)), images, labels)


def test_file_of_another_architecture_is_refused(trained, references):
    compressed = compress(trained, *references, "uniform")
    with pytest.raises(CompressedFileError, match="architecture"):
        compressed.to_model(build("lenet5"))


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
