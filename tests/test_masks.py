"""Masks against counts and ranks worked out by plain sorting."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lib import masks as masking

VALUES = st.integers(-3, 3).map(float)  # few values, many ties
SCORES = st.lists(st.lists(VALUES, min_size=1, max_size=12), min_size=1, max_size=4).map(
    lambda layers: {f"l{i}": torch.tensor(layer) for i, layer in enumerate(layers)}
)
FRACTIONS = st.floats(0, 1)


def ranked(scores):
    """(−score, position) of every weight, best first."""
    everything = [(name, i) for name, score in scores.items() for i in range(len(score))]
    return sorted(everything, key=lambda place: -scores[place[0]][place[1]].item())


@settings(max_examples=150, deadline=None)
@given(SCORES, FRACTIONS)
def test_keep_top_is_a_stable_sort_that_spares_each_layers_best(scores, fraction):
    total = sum(len(score) for score in scores.values())
    best = {(name, int(score.argmax())) for name, score in scores.items()}
    count = max(round(fraction * total), len(scores))
    others = [place for place in ranked(scores) if place not in best]
    expected = best | set(others[: count - len(best)])
    masks = masking.keep_top(scores, fraction)
    assert {(n, int(i)) for n, kept in masks.items() for i in kept.nonzero()} == expected


@settings(max_examples=50, deadline=None)
@given(SCORES, FRACTIONS)
def test_keep_top_per_layer_counts(scores, fraction):
    for name, kept in masking.keep_top(scores, fraction, scope="layer").items():
        assert kept.sum() == max(1, round(fraction * len(kept)))
        assert kept.all() or scores[name][kept].min() >= scores[name][~kept].max()


@settings(max_examples=100, deadline=None)
@given(SCORES, FRACTIONS)
def test_nonpositive_removes_the_nearest(scores, fraction):
    candidates = [place for place in ranked(scores) if scores[place[0]][place[1]] <= 0]
    expected = set(candidates[: round(fraction * len(candidates))])
    masks = masking.nonpositive(scores, fraction)
    assert {(n, int(i)) for n, kept in masks.items() for i in (~kept).nonzero()} == expected


def test_nonpositive_is_literal():
    scores = {"a": torch.tensor([[1.0, 0.0, -2.0]]), "b": torch.tensor([-1.0, 0.0])}
    masks = masking.nonpositive(scores)
    assert masks["a"].tolist() == [[True, False, False]]
    assert not masks["b"].any()
    assert masking.density(masks) == pytest.approx(1 / 5)


def test_earlier_rounds_do_not_count():
    scores = {"a": torch.tensor([0.0, 0.0, -1.0, -2.0, 3.0])}
    before = {"a": torch.tensor([False, False, True, True, True])}
    kept = masking.nonpositive(scores, 0.5, mask=before)["a"]
    assert kept.tolist() == [False, False, False, True, True]


def test_filters_go_whole():
    conv = torch.tensor([1.0, -1.0, 0.5, -0.25]).reshape(4, 1, 1, 1).expand(4, 2, 3, 3)
    scores = {"conv": conv, "fc": torch.randn(3, 4)}
    masks = masking.filters(scores, 0.5)
    assert masks["conv"].flatten(1).all(1).tolist() == [True, False, True, False]
    assert masks["fc"].all()
    masks = masking.filters(scores, 0.25)
    assert masks["conv"].flatten(1).any(1).tolist() == [True, False, False, False]
    assert masking.filters({"conv": -conv.abs()}, 0.0)["conv"].flatten(1).any(1).sum() == 1


def test_apply_zeroes_a_copy():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = masking.keep_top({"0.weight": model[0].weight.abs()}, 0.5)
    pruned = masking.apply(model, masks)
    assert torch.equal(pruned[0].weight, model[0].weight * masks["0.weight"])
    assert torch.equal(pruned[2].weight, model[2].weight)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_intersect():
    one, two = torch.tensor([True, True, False]), torch.tensor([True, False, True])
    joint = masking.intersect({"a": one}, {"a": two, "b": two})
    assert joint["a"].tolist() == [True, False, False] and joint["b"].tolist() == two.tolist()


@pytest.mark.parametrize(
    "rule",
    [
        masking.nonpositive,
        lambda scores: masking.filters(scores, 0.5),
        lambda scores: masking.keep_top(scores, 0.5),
    ],
)
def test_unusable_scores(rule):
    with pytest.raises(ValueError, match="'fc' hold NaN"):
        rule({"fc": torch.tensor([1.0, float("nan")])})
    with pytest.raises(ValueError, match="no scores"):
        rule({})


def test_unusable_arguments():
    scores = {"0.weight": torch.randn(3, 4)}
    for fraction in (-0.1, 1.1, float("nan")):
        for rule in (masking.keep_top, masking.nonpositive, masking.filters):
            with pytest.raises(ValueError, match="outside"):
                rule(scores, fraction)
    with pytest.raises(ValueError, match="scope 'row'"):
        masking.keep_top(scores, 0.5, scope="row")
    model = nn.Sequential(nn.Linear(4, 3))
    for name, mask, message in [
        ("1.weight", torch.ones(3, 4) > 0, "no such"),
        ("0.weight", torch.ones(4, 3) > 0, "'0.weight' is"),
        ("0.weight", torch.ones(3, 4), "must be bool"),
    ]:
        with pytest.raises(ValueError, match=message):
            masking.apply(model, {name: mask})
