"""The search for a budget: what it finds, and how many files it takes."""

import sys

import pytest

from lib.compress import compress
from lib.finetune import evaluate
from lib.quantize import Uniform
from lib.recipe import Recipe
from study.networks import build
from study.training import fit

pytestmark = pytest.mark.filterwarnings("ignore:compression took:UserWarning")


@pytest.fixture
def files(monkeypatch):
    """All files that are made."""
    module, made = sys.modules["lib.compress"], []
    whole = module.encode

    def counted(*arguments):
        made.append(whole(*arguments))
        return made[-1]

    monkeypatch.setattr(module, "encode", counted)
    return made


@pytest.mark.parametrize("name", ["resnet8", "lenet300"])
def test_a_budget_of_bytes_takes_at_most_three_files(name, trained, digits, references, files):
    model = trained
    if name == "lenet300":  # inputs alike, so that a price buys far fewer bits
        model = fit(build(name), *digits, epochs=1, lr=0.05, batch_size=64)
    floats = sum(4 * value.numel() for value in model.state_dict().values())
    for ratio in (4, 8, 16, 32):
        files.clear()
        size = compress(model, *references, ratio=ratio).nbytes
        assert 0.9 * floats / ratio < size <= floats / ratio
        assert len(files) <= 3


def test_max_drop_is_met_on_the_validation_split(trained, references, validation, files):
    base = evaluate(trained, *validation)
    found = []
    for drop in (5.0, 0.5, 0):
        files.clear()
        found.append(compress(trained, *references, "lrp-rd", val=validation, max_drop=drop))
        assert len(files) <= 7  # of 261 settings bisection takes 8
    small, exact, none = found
    assert evaluate(small.to_model(trained), *validation) >= base - 5.0
    assert evaluate(exact.to_model(trained), *validation) >= base - 0.5
    assert evaluate(none.to_model(trained), *validation) >= base
    assert small.nbytes < exact.nbytes <= none.nbytes


def test_max_drop_is_judged_on_the_file_and_on_the_images_given(trained, references, validation):
    """The network before it was stored loses nothing: it would let the smallest file pass."""
    recipe, (images, labels) = Recipe(store=Uniform(2)), validation
    found = compress(trained, *references, recipe, val=validation, max_drop=2.0)
    smallest = compress(trained, *references, recipe)
    base = evaluate(trained, *validation)
    assert evaluate(smallest.to_model(trained), *validation) < base - 2.0
    assert evaluate(found.to_model(trained), *validation) >= base - 2.0
    wrong = images, (labels + 1) % 10  # on these there is hardly anything to lose
    other = compress(trained, *references, recipe, val=wrong, max_drop=50.0)
    assert other.nbytes == smallest.nbytes < found.nbytes
