"""Quantizers as parts of a recipe: what decides the bits, of which network, to what effect."""

import copy
import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from spread import assert_above, assert_below
from torch import nn

from lib.baselines import magnitude
from lib.codec import Compressed
from lib.compress import compress, encode, prepare, remove
from lib.fold import fold_batchnorm
from lib.linear import hooked
from lib.moments import input_moments
from lib.prune import KeepTop, NonPositive
from lib.quantize import (
    Codes,
    LayerWidths,
    Quantizer,
    RateDistortion,
    Tiers,
    Uniform,
    energy,
)
from lib.recipe import Recipe, Repair
from lib.relevance import scored_weights
from lib.score import CRITERIA, Criterion
from study.networks import build

pytestmark = pytest.mark.filterwarnings("ignore:compression took:UserWarning")
PRUNED = NonPositive("lrp-epsilon/contrastive", fraction=0.5)
ALL = [Uniform(), Tiers(), LayerWidths(), RateDistortion()]


@pytest.fixture(scope="module")
def dense(trained, references):
    """The trained network with nothing removed."""
    return remove(trained, *references, Recipe())


@pytest.fixture(scope="module")
def pruned(trained, references):
    """The trained network after one round of pruning, not repaired."""
    return remove(trained, *references, Recipe(PRUNED))


def coded(removed, references, store):
    """Codes of a network by a quantizer."""
    weights = {name: removed.network.get_parameter(name).detach() for name in removed.masks}
    return store.codes(weights, removed.masks, store.prepare(removed, *references))


@pytest.mark.parametrize("store", ALL, ids=lambda store: type(store).__name__)
def test_the_knob_is_a_field_and_sizes_fall_along_its_settings(store, dense, references):
    few = [store.settings[len(store.settings) * part // 8] for part in (2, 5, 7)]
    prepared, sizes = prepare(dense, *references, Recipe(store=store)), []
    for value in few:
        assert store.at(value).value == value == getattr(store.at(value), store.knob)
        assert store.at(value) == replace(store, **{store.knob: value})
        sizes.append(encode(prepared, Recipe(store=store.at(value))).nbytes)
    for number, (larger, smaller) in enumerate(pairwise(sizes), 1):
        kind = type(store).__name__
        assert_below(smaller / larger, 1, f"file over the one before it, {kind}, {number}")
    for end in (store.settings[0], store.settings[-1]):
        store.at(end)


@pytest.mark.parametrize("store", ALL, ids=lambda store: type(store).__name__)
def test_removed_weights_stay_removed(store, pruned, references):
    for name, code in coded(pruned, references, store).items():
        assert not code.decode()[~pruned.masks[name]].any()


@pytest.mark.parametrize("make", [Tiers, LayerWidths, RateDistortion])
def test_what_decides_the_bits_is_the_network_that_is_stored_on_all_images(
    make, pruned, references
):
    seen = []

    def spy(model, images, labels):
        seen.append((model, images, labels))
        return magnitude(model, images, labels)

    make(Criterion("spy", spy)).prepare(pruned, *references)
    assert seen
    for model, images, labels in seen:
        assert torch.equal(images, references[0]) and torch.equal(labels, references[1])
        for name, weight in scored_weights(model).items():
            assert torch.equal(weight, pruned.network.get_parameter(name))


def test_uniform_takes_the_nearest_whole_number_of_bits(dense, references):
    for bits in (3, 3.4, 2.6):
        for code in coded(dense, references, Uniform(bits)).values():
            assert int(code.symbols.abs().max()) == 3


def test_tiers_have_the_widths_asked_for(dense, references):
    for code in coded(dense, references, Tiers(widths=(0, 2, 3), bits=2.5)).values():
        largest = [int(code.symbols[code.tiers == tier].abs().max()) for tier in (1, 2)]
        assert largest == [1, 3]


def test_weights_of_higher_scores_are_in_wider_tiers_over_all_layers(pruned, references):
    name = "lrp-epsilon/contrastive"
    codes = coded(pruned, references, Tiers(name, bits=5.0))
    scores = CRITERIA[name](pruned.network, *references)
    kept = {n: pruned.masks[n] for n in codes}
    score, tier = (
        torch.cat([values[n][kept[n]] for n in codes])
        for values in (scores, {n: code.tiers for n, code in codes.items()})
    )
    # A tier's share of a layer is a float32, which may put a weight beside its place in it.
    wrong = 0
    for low in (1, 2):
        limit = int((tier <= low).sum())
        wrong += int((tier[score.argsort()][:limit] > low).sum())
    assert_below(wrong, 2 * len(codes), "weights beside their place")
    widths = torch.tensor([0.0, 2, 4, 8])[tier.long()]
    assert_below(abs(widths.mean() - 5), 0.02, "distance from the bits asked for")


def test_the_layer_that_matters_most_is_stored_most_finely(dense, references):
    first, *others = dense.masks

    def only(wanted):
        def score(model, images, labels):
            weights = scored_weights(model)
            return {
                n: torch.full_like(w, 100.0 if n == wanted else 1.0) for n, w in weights.items()
            }

        return Criterion(wanted, score)

    for wanted in (first, others[-1]):
        codes = coded(dense, references, LayerWidths(only(wanted), bits=4.0))
        values = {n: len(code.grid) for n, code in codes.items()}
        assert values[wanted] > max(v for n, v in values.items() if n != wanted)
        weights = {n: code.symbols.numel() for n, code in codes.items()}
        used = sum(math.log2(values[n] - 1) * weights[n] for n in codes)
        assert used <= 4.0 * sum(weights.values()) + 1e-6


def test_importance_of_a_layer_is_its_mean_absolute_score(pruned, references):
    found = LayerWidths("lrp-epsilon").prepare(pruned, *references)
    scores = CRITERIA["lrp-epsilon"](pruned.network, *references)
    assert found == {name: float(score.abs().mean()) for name, score in scores.items()}


def test_units_of_more_relevance_are_coded_more_exactly():
    """By a criterion of one's own that calls every other unit a hundred times more."""

    def every_other(model, images, labels):
        return {n: 1 + 99.0 * (torch.arange(len(w)) % 2) for n, w in scored_weights(model).items()}

    torch.manual_seed(0)
    images, labels = torch.randn(400, 30), torch.arange(400) % 40
    removed = remove(nn.Sequential(nn.Linear(30, 40)), images, labels, Recipe())
    mine = Criterion("every-other", magnitude, unit_function=every_other)
    kept = []
    for by in (mine, "alike"):
        code = coded(removed, (images, labels), RateDistortion(by, price=0.3))["0.weight"]
        kept.append([int((code.symbols[first::2] != 0).sum()) for first in (0, 1)])
    assert kept[0][1] > 2 * kept[0][0]
    assert 0.8 < kept[1][1] / kept[1][0] < 1.25


def test_the_layers_whose_units_matter_get_the_bits(dense, references):
    """Weights of units are comparable between layers; so bits go where relevance is."""
    first, *_, last = dense.masks

    def only(wanted):
        def units(model, images, labels):
            weights = scored_weights(model)
            return {n: torch.ones(len(w)) * (1e4 if n == wanted else 1) for n, w in weights.items()}

        return Criterion(wanted, magnitude, unit_function=units)

    kept = {}
    for wanted in (first, last):
        codes = coded(dense, references, RateDistortion(only(wanted), price=0.1))
        kept[wanted] = {n: int(code.symbols.count_nonzero()) for n, code in codes.items()}
    for mine, other, name in ((first, last, "first"), (last, first, "last")):
        share = kept[other][mine] / kept[mine][mine]
        assert_below(share, 0.77, f"weights kept in the {name} layer where another matters")


@pytest.mark.parametrize("by", ["lrp-epsilon/contrastive", "root:lrp-epsilon", "alike", "fisher"])
def test_a_price_is_a_share_of_what_removing_all_weights_would_do(by, dense, references):
    """At high rate a weight's damage is λ / (2 ln 2); so that of all, relative to removal, is
    price / (2 ln 2), whatever weighs the units. The tolerance is that of one layer alone."""
    store = RateDistortion(by, price=1e-3)
    codes = coded(dense, references, store)
    moments = input_moments(dense.network, references[0], centered=True)
    units = CRITERIA[by].units(dense.network, *references)
    removed = damage = 0.0
    for name, code in codes.items():
        weight = dense.network.get_parameter(name).detach()
        removed += energy(weight, moments[name], units[name])
        damage += energy(weight - code.decode(), moments[name], units[name])
    share = damage / removed / (store.price / (2 * math.log(2)))
    assert_below(abs(share - 1), 0.15, f"distance of the damage from theory, {by}")


def test_bits_do_not_depend_on_the_scale_of_weights_or_images(references):
    torch.manual_seed(0)
    images, labels = references
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 32, bias=False), nn.ReLU(), nn.Linear(32, 10, bias=False)
    )
    sizes = []
    for weights, inputs in ((1, 1), (4, 1), (1, 1 / 8), (1 / 16, 4), (3, 0.7)):
        scaled = copy.deepcopy(model)
        for weight in scaled.parameters():
            weight.data *= weights
        removed = remove(scaled, images * inputs, labels, Recipe())
        codes = coded(removed, (images * inputs, labels), RateDistortion("lrp-epsilon"))
        sizes.append(sum(int(code.symbols.abs().sum()) for code in codes.values()))
    assert sizes[0] == sizes[1] == sizes[2] == sizes[3]  # powers of two round nothing
    assert sizes[4] == pytest.approx(sizes[0], rel=0.02)  # the step is a float16: 2 ** -11


def test_moments_are_of_the_inputs_of_the_network_that_is_stored(pruned, references):
    found = RateDistortion().prepare(pruned, *references).moments
    expected = input_moments(pruned.network, references[0], centered=True)
    assert found.keys() == expected.keys() == pruned.masks.keys()
    assert all(torch.equal(moment, expected[name]) for name, moment in found.items())


def test_errors_are_compensated_on_the_way_to_the_file(dense, references):
    """Rounding the same weights to the same grids, one by one, does more damage."""
    store = RateDistortion(price=1e-3)
    prepared = store.prepare(dense, *references)
    chosen = rounded = 0.0
    for name, code in coded(dense, references, store).items():
        weight = dense.network.get_parameter(name).detach()
        problem = prepared.moments[name], prepared.units[name]
        chosen += energy(weight - code.decode(), *problem)
        rounded += energy(weight - code.grid * (weight / code.grid).round(), *problem)
    assert_below(chosen / rounded, 0.9, "damage over that of rounding")


@pytest.mark.parametrize("make", ["resnet8", "lenet5", "lenet300"])
def test_a_network_that_puts_out_the_same_for_all_images_can_be_stored(make, references):
    """As a rule leaves it that empties a layer: what its layers read does not vary."""
    recipe = Recipe(KeepTop("magnitude", density=1e-6))
    removed = remove(build(make), *references, recipe)
    for name, code in coded(removed, references, recipe.store).items():
        assert not code.decode()[~removed.masks[name]].any()


def test_layers_without_known_inputs_get_eight_bits(references):
    class Own(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight, self.bias)

    torch.manual_seed(0)
    model = nn.Sequential(Own(28, 2), nn.Flatten(), nn.Linear(2 * 28, 10))
    removed = remove(model, *references, Recipe())
    codes = coded(removed, references, RateDistortion(price=0.1))
    assert int(codes["0.weight"].symbols.abs().max()) == 127
    assert int(codes["2.weight"].symbols.abs().max()) < 10


def means(model, names, images):
    """Mean pre-activation of each unit of each layer."""
    found = {}

    def keep(name, layer, inputs, output):
        found[name] = output.transpose(0, 1).flatten(1).mean(1)

    with torch.no_grad(), hooked(model.eval(), names, keep):
        model(images)
    return found


@pytest.mark.parametrize("repair", [Repair(), Repair(refit=True)], ids=["pruned", "refitted"])
def test_biases_make_up_for_quantization_but_not_for_pruning(repair, trained, references):
    """Units of the file have the means of the network that was stored, not of the dense one: to
    within what biases lose in float16, 2 ** -11 of them."""
    removed = remove(trained, *references, Recipe(PRUNED, repair))
    recipe = Recipe(PRUNED, repair, Uniform(3))
    file = encode(prepare(removed, *references, recipe), recipe)
    names = [name.removesuffix(".weight") for name in removed.masks]
    stored, wanted, before = (
        means(model, names, references[0])
        for model in (
            fold_batchnorm(file.to_model(trained)),
            removed.network,
            removed.folded.network,
        )
    )
    kind = "refitted" if repair.refit else "pruned"
    errors = []
    for name in names:
        bias = removed.network.get_submodule(name).bias.detach()
        size = bias.abs().max() + wanted[name].abs().max()
        errors.append((stored[name] - wanted[name]).abs().max() / size)
    assert_below(torch.stack(errors).max(), 0.01, f"largest error of a mean, {kind}")
    if not repair.refit:
        apart = [(before[n] - wanted[n]).abs().max() / wanted[n].abs().max() for n in names]
        assert_above(max(apart), 0.1, "largest change of a mean by pruning")


@dataclass(frozen=True)
class Signs(Quantizer):
    """One value for the largest weights of each layer, zero for the rest: one of one's own."""

    knob = "share"
    settings = tuple(1 - step / 50 for step in range(50))
    share: float = 0.5

    def codes(self, weights, masks, prepared):
        codes = {}
        for name, w in weights.items():
            large = w.abs() >= w.abs().flatten().quantile(1 - self.share)
            step = w[large].abs().mean().half().float().reshape(1)
            codes[name] = Codes((w.sign() * large * masks[name]).int(), step, "uniform")
        return codes


def test_a_quantizer_of_ones_own_is_carried_to_the_file(trained, references, tmp_path):
    recipe = Recipe(KeepTop("magnitude", density=0.6), store=Signs(0.3))
    compress(trained, *references, recipe).save(tmp_path / "mine")
    decoded = Compressed.load(tmp_path / "mine").to_model(trained).state_dict()
    for name in remove(trained, *references, recipe).masks:
        assert decoded[name].abs().unique().numel() == 2
        # kept are the largest: what was pruned, by magnitude over all layers, may be more
        assert float((decoded[name] != 0).float().mean()) <= 0.31
    weights = sum(weight.numel() for weight in scored_weights(trained).values())
    small = compress(trained, *references, recipe, bits=1.0)
    assert small.nbytes <= weights / 8
    assert_above(small.nbytes / (weights / 8), 0.9, "share of the budget that is used")
    larger = compress(trained, *references, recipe, bits=1.4).nbytes
    assert_below(small.nbytes / larger, 1, "file of one bit a weight over 1.4")


@pytest.mark.parametrize(
    "make, fields, message",
    [
        (Uniform, {"bits": 0.9}, "bits must lie in"),
        (Uniform, {"bits": 9}, "bits must lie in"),
        (Uniform, {"bits": -1}, "bits must lie in"),
        (Uniform, {"bits": math.nan}, "bits must lie in"),
        (Tiers, {"bits": 0}, "bits must lie in"),
        (Tiers, {"bits": -1}, "bits must lie in"),
        (Tiers, {"bits": 8.5}, "bits must lie in"),
        (Tiers, {"widths": (2, 4)}, "widths must ascend from 0"),
        (Tiers, {"widths": (0, 4, 2)}, "widths must ascend from 0"),
        (Tiers, {"widths": (0, 2, 2)}, "widths must ascend from 0"),
        (Tiers, {"widths": (0,)}, "widths must hold one"),
        (Tiers, {"widths": (0, 4, 16)}, "widths must hold one"),
        (Tiers, {"by": "lrp-epsilom"}, "unknown criterion 'lrp-epsilom'; known: .*deeplift"),
        (LayerWidths, {"bits": 0.5}, "bits must lie in"),
        (LayerWidths, {"bits": -1}, "bits must lie in"),
        (LayerWidths, {"bits": 8.5}, "bits must lie in"),
        (LayerWidths, {"by": "rot:fisher"}, "unknown criterion 'rot:"),
        (RateDistortion, {"price": 0}, "price must be positive"),
        (RateDistortion, {"price": -0.1}, "price must be positive"),
        (RateDistortion, {"price": math.inf}, "price must be positive"),
        (RateDistortion, {"price": math.nan}, "price must be positive"),
        (RateDistortion, {"by": "rot:fisher"}, "unknown criterion 'rot:"),
    ],
)
def test_unusable_fields_are_refused(make, fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)
    if (knob := make.knob) in fields:
        with pytest.raises(ValueError, match=message):
            make().at(fields[knob])
