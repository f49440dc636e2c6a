from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lib import checks
from lib.data import sample
from lib.runs import Case, split


@pytest.fixture
def study():
    """One network of 64 hidden units, half of which hardly reach the logits."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, 10))
    train = split("digits", "train")
    network(train[0][:2])
    with torch.no_grad():
        network[3].weight[:, ::2] *= 1e-3
    return SimpleNamespace(
        cases=[Case("digits", "toy", 0)],
        base=lambda case: network,
        references=lambda case: sample(*train, 5),
    )


def test_relevance_foretells_harm_that_the_size_of_the_error_does_not(study):
    lrp = "lrp-epsilon/contrastive"
    before = [p.clone() for p in study.base(None).parameters()]
    row = checks.harm_foretold(study, [lrp, "alike", f"reversed:{lrp}"], bits=4, groups=8).loc[0]
    assert (row["dataset"], row["model"], row["groups"]) == ("digits", "toy", 16)
    assert row[lrp] > 0.9 > row["alike"] > row[f"reversed:{lrp}"]
    assert all(map(torch.equal, before, study.base(None).parameters()))
