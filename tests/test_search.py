"""The search for a budget: what it finds, and how many files it takes."""

import math

import pytest
from spread import assert_above, assert_below

from lib import search
from lib.compress import compress
from lib.finetune import evaluate
from lib.quantize import RateDistortion, Uniform
from lib.recipe import Recipe
from study.networks import build
from study.training import fit

pytestmark = pytest.mark.filterwarnings("ignore:compression took:UserWarning")


@pytest.mark.parametrize("name", ["resnet8", "lenet300"])
def test_a_budget_of_bytes_takes_at_most_three_files(name, trained, digits, references, made):
    """But where they leave more than a tenth of it, which they hardly do."""
    model = trained
    if name == "lenet300":  # inputs alike, so that a price buys far fewer bits
        model = fit(build(name), *digits, epochs=1, lr=0.05, batch_size=64)
    floats = sum(4 * value.numel() for value in model.state_dict().values())
    used = []
    for ratio in (4, 8, 16, 32):
        made.clear()
        assert compress(model, *references, ratio=ratio).nbytes <= floats / ratio
        shares = [file.nbytes * ratio / floats for _, file in made[: search.FILES]]
        used.append(max((share for share in shares if share <= 1), default=0.0))
        assert len(made) <= search.FILES or used[-1] <= math.exp(-search.FAR)
    mean = sum(used) / len(used)
    assert_above(mean, 1 - search.FAR, f"share of a budget that three files use, mean, {name}")


def test_max_drop_is_met_on_the_validation_split(trained, references, validation, made):
    base = evaluate(trained, *validation)
    found, counts = [], []
    for drop in (5.0, 0.5, 0):
        made.clear()
        found.append(compress(trained, *references, "lrp-rd", val=validation, max_drop=drop))
        counts.append(len(made))
    bisection = len(RateDistortion.settings).bit_length()
    assert max(counts) <= bisection + search.SPARE
    small, exact, none = found
    assert evaluate(small.to_model(trained), *validation) >= base - 5.0
    assert evaluate(exact.to_model(trained), *validation) >= base - 0.5
    assert evaluate(none.to_model(trained), *validation) >= base
    assert_below(small.nbytes / exact.nbytes, 1, "file that may lose 5 points over half a point")
    assert exact.nbytes <= none.nbytes


def test_max_drop_is_judged_on_the_file_and_on_the_images_given(trained, references, validation):
    """The network before it was stored loses nothing: it would let the smallest file pass."""
    recipe, (images, labels) = Recipe(store=Uniform(2)), validation
    found = compress(trained, *references, recipe, val=validation, max_drop=2.0)
    smallest = compress(trained, *references, recipe)
    base = evaluate(trained, *validation)
    lost = base - evaluate(smallest.to_model(trained), *validation)
    assert_above(lost, 2.0, "points that the smallest file loses")
    assert evaluate(found.to_model(trained), *validation) >= base - 2.0
    wrong = images, (labels + 1) % 10  # on these there is hardly anything to lose
    other = compress(trained, *references, recipe, val=wrong, max_drop=50.0)
    assert other.nbytes == smallest.nbytes < found.nbytes


@pytest.mark.parametrize("steep", [1, 5, 40])
@pytest.mark.parametrize("place", [0, 3, 77, 150, 260, 300])
@pytest.mark.parametrize("most", [0, 0.5, 5])
def test_the_smallest_file_is_found_wherever_it_lies_and_in_few(steep, place, most):
    """Files are their knobs; what they lose rises with them, slowly or at once."""
    made = []

    def at(knob):
        made.append(knob)
        return knob

    knobs = list(range(261))

    def lost(knob):
        return most + max(-1.0, min(90.0, (knob - place) / steep + 0.01))

    found = search.smallest_within(most, lost, at, knobs, start=120)
    fits = [knob for knob in knobs if lost(knob) <= most]
    assert found == (max(fits) if fits else None)
    assert len(made) <= len(knobs).bit_length() + search.SPARE == 11
