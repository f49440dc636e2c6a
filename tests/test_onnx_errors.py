"""ONNX files: what cannot be written or run says why, and an older file stays."""

import os
import sys

import pytest
import torch
from torch import nn

from lib.codec import Compressed
from lib.onnx import run_onnx, to_onnx


class Branching(nn.Linear):
    """Computes something else for other values."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else -super().forward(x)


class FixedBatch(nn.Linear):
    """Works for the number of images it was traced with."""

    def forward(self, x):
        return super().forward(x) + torch.arange(len(x)).float()[:, None]


class Eigenvalues(nn.Linear):
    """Has an operation that ONNX lacks."""

    def forward(self, x):
        return torch.linalg.eigvalsh(super().forward(x)[:, :, None] * torch.eye(4))


class TwoOutputs(nn.Linear):
    """Returns a pair."""

    def forward(self, x):
        return super().forward(x), x


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("kind", "message"), [
    (Branching, "fixed sequence of tensor operations"),
    (FixedBatch, "cannot be written as ONNX|fixed sequence"),
    (Eigenvalues, r"linalg_eigvalsh.*Compressed\.save"),
    (TwoOutputs, "one output"),
])  # fmt: skip
def test_networks_without_onnx_form_leave_no_file(kind, message, int8, tmp_path):
    model = kind(4, 4).eval()
    images = torch.cat([torch.ones(2, 4), -9 * torch.ones(3, 4)])
    path = tmp_path / "a.onnx"
    path.write_bytes(b"older")
    with pytest.raises(ValueError, match=message):
        to_onnx(Compressed(model.state_dict()), model, images, path, int8=int8)
    assert path.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["a.onnx"]


def test_bad_arguments_name_the_way_out(tmp_path):
    model = nn.Linear(4, 2).eval()
    compressed, images = Compressed(model.state_dict()), torch.randn(3, 4)
    with pytest.raises(ValueError, match="no folder .*missing; create it"):
        to_onnx(compressed, model, images, tmp_path / "missing" / "a.onnx")
    with pytest.raises(ValueError, match="is a folder"):
        to_onnx(compressed, model, images, tmp_path)
    with pytest.raises(ValueError, match="N >= 1"):
        to_onnx(compressed, model, images[:0], tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="finite"):
        to_onnx(compressed, model, images / 0, tmp_path / "a.onnx", int8=True)
    with pytest.raises(ValueError, match=r"images \[3, 5\], give it images as in training"):
        to_onnx(compressed, model, torch.randn(3, 5), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="another architecture"):
        to_onnx(compressed, nn.Linear(4, 3), images, tmp_path / "a.onnx")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_without_the_packages_an_error_says_how_to_get_them(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    model, images = nn.Linear(4, 2), torch.randn(3, 4)
    with pytest.raises(ImportError, match=r'pip install "xai-compression\[onnx\]"'):
        to_onnx(Compressed(model.state_dict()), model, images, tmp_path / "a.onnx")
    with pytest.raises(ImportError, match=r'pip install "xai-compression\[onnx\]"'):
        run_onnx(tmp_path / "a.onnx", images)


def test_a_failed_write_leaves_the_older_file(tmp_path, monkeypatch):
    model, path = nn.Linear(4, 2).eval(), tmp_path / "a.onnx"
    path.write_bytes(b"older")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        to_onnx(Compressed(model.state_dict()), model, torch.randn(3, 4), path)
    assert path.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["a.onnx"]


def test_run_onnx_explains_unusable_files_and_images(tmp_path):
    model, path = nn.Linear(4, 2).eval(), tmp_path / "a.onnx"
    with pytest.raises(ValueError, match="cannot be read .*write it first"):
        run_onnx(path, torch.randn(3, 4))
    path.write_bytes(b"no model")
    with pytest.raises(ValueError, match="not a usable ONNX file"):
        run_onnx(path, torch.randn(3, 4))
    to_onnx(Compressed(model.state_dict()), model, torch.randn(3, 4), path)
    with pytest.raises(ValueError, match=r"cannot be run on \[3, 5\]"):
        run_onnx(path, torch.randn(3, 5))
    images = torch.randn(7, 4)
    assert torch.allclose(run_onnx(path, images, batch_size=3), model(images), atol=1e-6)


class Twice(nn.Module):
    """A layer with a bias on two scales: onnxruntime cannot give it integers."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv2d(1, 1, 1), nn.Linear(9, 3)

    def forward(self, x):
        return self.head(self.layer(self.layer(x).relu()).relu().flatten(1))


def test_networks_without_an_integer_form_say_so_and_leave_no_file(tmp_path):
    model, images = Twice().eval(), torch.randn(20, 1, 3, 3)
    with pytest.raises(ValueError, match="cannot be written in 8 bits: .*int8=False"):
        to_onnx(Compressed(model.state_dict()), model, images, tmp_path / "a.onnx", int8=True)
    assert not list(tmp_path.iterdir())
    assert to_onnx(Compressed(model.state_dict()), model, images, tmp_path / "a.onnx") > 0
