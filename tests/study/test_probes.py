from types import SimpleNamespace

import pytest
import torch
from spread import assert_above, assert_below
from torch import nn

from study import probes
from study.data import sample, split
from study.profiles import Case


@pytest.fixture
def study():
    """One network of 64 hidden units, half of which hardly reach the logits.

    Far enough still for rounding not to decide which of these does the least harm.
    """
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, 10))
    train = split("digits", "train")
    network(train[0][:2])
    with torch.no_grad():
        network[3].weight[:, ::2] *= 0.03
    return SimpleNamespace(
        cases=[Case("digits", "toy", 0)],
        base=lambda case: network,
        references=lambda case: sample(*train, 5),
    )


def test_relevance_foretells_harm_that_the_size_of_the_error_does_not(study):
    lrp = "lrp-epsilon/contrastive"
    before = [p.clone() for p in study.base(None).parameters()]
    row = probes.harm_foretold(study, [lrp, "alike", f"reversed:{lrp}"], bits=4, groups=8).loc[0]
    assert (row["dataset"], row["model"], row["groups"]) == ("digits", "toy", 16)
    assert_above(row[lrp], 0.9, "correlation of relevance with harm")
    assert_below(row["alike"], 0.9, "correlation of the error's size with harm")
    against = row["alike"] - row[f"reversed:{lrp}"]
    assert_above(against, 0, "that of the error's size beyond that of relevance in reverse")
    assert all(map(torch.equal, before, study.base(None).parameters()))


def test_rank_correlation_gives_equal_scores_the_same_rank():
    one = {"a": torch.tensor([0.0, 0.0, 1.0, 2.0]), "b": torch.tensor([[3.0]])}
    same = {"a": torch.tensor([5.0, 5.0, 6.0, 9.0]), "b": torch.tensor([[10.0]])}
    back = {name: -value for name, value in one.items()}
    expected = [[1, 1, -1], [1, 1, -1], [-1, -1, 1]]
    assert probes.rank_correlation([one, same, back]) == pytest.approx(torch.tensor(expected))
    assert probes.rank_correlation([one, back]) == pytest.approx(torch.tensor([[1, -1], [-1, 1]]))
    some = probes.rank_correlation([one, {"a": torch.ones(4), "b": torch.tensor([[2.0]])}])[0, 1]
    assert some == pytest.approx(0.7255, abs=1e-4)  # (4, 1.5, ...) by hand: ties at mean ranks
