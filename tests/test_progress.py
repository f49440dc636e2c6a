"""``compress(progress=True)``: one line, every layer once, nothing else changed."""

import re

import pytest
import torch
from torch import nn

from lib import RECIPES, Recipe, compress
from lib.progress import Progress
from lib.quantize import LayerWidths, Tiers, Uniform


def case():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    return model.eval(), torch.randn(60, 8), torch.arange(60) % 3


RECIPES_TRIED = {
    "uniform": Recipe(store=Uniform()),
    "tiers": Recipe(store=Tiers("magnitude")),
    "widths": Recipe(store=LayerWidths("magnitude")),
    "rd": RECIPES["lrp-rd"],
    "sequential": RECIPES["lrp-sequential"],
}


@pytest.mark.parametrize("recipe", RECIPES_TRIED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_layer_is_told_of_once(recipe, capsys):
    plain = compress(*case(), RECIPES_TRIED[recipe])
    assert capsys.readouterr().err == ""
    shown = compress(*case(), RECIPES_TRIED[recipe], progress=True)
    err = capsys.readouterr().err
    counts = re.findall(r"file 1: (\d) of 3 layers", err)
    assert counts == ["0", "1", "2", "3"]
    assert err.count("\n") == 1 and err.endswith("\n")
    assert shown.nbytes == plain.nbytes


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_budget_counts_its_files(capsys):
    compress(*case(), RECIPES_TRIED["rd"], ratio=6, progress=True)
    files = re.findall(r"file (\d+): 3 of 3", capsys.readouterr().err)
    assert files == [str(n) for n in range(1, len(files) + 1)] and len(files) > 1


def test_time_left_is_in_proportion_to_weights(monkeypatch, capsys):
    now = iter([100.0, 110.0, 140.0])
    monkeypatch.setattr("lib.progress.time.monotonic", lambda: next(now))
    progress = Progress()
    progress.begin({"a": 10, "b": 30})
    progress.done("a")
    progress.done("b")
    lines = [line.strip() for line in capsys.readouterr().err.split("\r")[1:]]
    assert lines == [
        "file 1: 0 of 2 layers",
        "file 1: 1 of 2 layers, 30 s left",
        "file 1: 2 of 2 layers, 0 s left",
    ]
