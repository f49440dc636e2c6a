"""Code blocks of the README run as written."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.S | re.M)
PYTHON = [code for language, code in BLOCKS if language == "python"]
LINES = [line.partition("#")[0].strip() for kind, code in BLOCKS if kind == "sh"
         for line in code.splitlines()]  # fmt: skip


def test_blocks_are_of_two_kinds():
    assert PYTHON and LINES and {language for language, _ in BLOCKS} == {"python", "sh"}


@pytest.mark.filterwarnings("ignore:the model itself is near chance")
@pytest.mark.parametrize("code", PYTHON)
def test_python_blocks_run_on_a_model_and_a_loader(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
    labels = torch.arange(300) % 10
    images = torch.randn(300, 1, 8, 8) + labels[:, None, None, None] / 5
    loader = DataLoader(TensorDataset(images, labels), batch_size=300)
    known = {"model": model, "loader": loader}
    exec(compile(code, "README.md", "exec"), known)
    size = (tmp_path / "model.xaic").stat().st_size
    floats = 4 * sum(math.prod(p.shape) for p in model.parameters())
    assert floats / size >= 20 and "1.weight" in capsys.readouterr().out
    assert known["again"](images).shape == (300, 10)
    assert known["state"].keys() == model.state_dict().keys()


@pytest.mark.parametrize("line", LINES)
def test_shell_lines_name_what_is_there(line):
    if line.startswith("make "):
        target, *settings = line.split()[1:]
        makefile = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{target}:", makefile, flags=re.M)
        assert all(f"$({setting.partition('=')[0]})" in makefile for setting in settings)
    else:
        (extra,) = re.fullmatch(r'pip install (?:\.|"\.\[(\w+)\]")', line).groups()
        project = (ROOT / "pyproject.toml").read_text()
        assert extra is None or re.search(rf"^{extra} = \[", project, flags=re.M)
