"""Compressed: round trips, sizes, summaries, atomic saving."""

import os

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from xaic_files import codes, example, network, same

from lib.codec import Compressed, CompressedFileError, Constant, container
from lib.quantize import KINDS, Codes

LAYERS = ["0.weight", "4.weight"]


@pytest.fixture(scope="module")
def compressed():
    return example()


def test_save_load_and_put_back_into_the_model(compressed, tmp_path):
    path = tmp_path / "model.xaic"
    size = compressed.save(path)
    loaded = Compressed.load(path)
    assert size == os.stat(path).st_size == compressed.nbytes == loaded.nbytes
    assert same(loaded.state_dict(), compressed.state_dict()) and loaded.meta == compressed.meta
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    restored = loaded.to_model(model)
    assert same(model.state_dict(), before)
    for name, tensor in restored.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, compressed.state_dict()[name].to(tensor.dtype))
    assert os.listdir(tmp_path) == ["model.xaic"]


def test_summary_adds_up_to_the_file(compressed):
    rows = compressed.summary()
    assert [row.layer for row in rows] == ["0.weight", "4.weight", "(rest)"]
    assert sum(row.bytes for row in rows) == compressed.nbytes
    assert sum(row.share for row in rows) == pytest.approx(1)
    _, layer, rest = rows
    assert layer.weights == 640
    assert layer.kept == compressed["4.weight"].decode().count_nonzero()
    assert layer.bits == layer.bytes * 8 / 640
    others = [value for name, value in compressed.state_dict().items() if name not in LAYERS]
    assert rest.weights == sum(value.numel() for value in others)
    assert rest.kept == sum(int(value.count_nonzero()) for value in others)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_weights_are_those_that_decode_to_other_than_zero(kind):
    held = Compressed({"w": codes((9, 40), kind, seed=3)})
    assert held.summary()[0].kept == held["w"].decode().count_nonzero() not in (0, 360)


def test_summary_prints_as_a_table_and_makes_a_frame(compressed):
    rows = compressed.summary()
    lines = str(rows).splitlines()
    assert len(lines) == 4
    assert " ".join(lines[0].split()) == "layer weights kept bits a weight bytes share"
    assert lines[2].startswith("4.weight  ") and f" {rows[1].kept} " in lines[2]
    assert len({line.rindex("%") for line in lines[1:]}) == 1
    assert repr(rows) == str(rows)
    frame = pd.DataFrame(rows)
    assert list(frame) == ["layer", "weights", "kept", "bits", "bytes", "share"]
    assert frame["bytes"].sum() == compressed.nbytes and len(frame) == 3


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_round_trip_of_any_entries(data):
    shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)
    entries = {}
    for name in data.draw(st.lists(st.text(max_size=12), unique=True, max_size=6)):
        shape = data.draw(shapes)
        what = data.draw(st.sampled_from([*KINDS, "tensor", "constant", "again"]))
        dtype = data.draw(st.sampled_from(container._DTYPES))
        if what == "again" and entries:
            entries[name] = entries[data.draw(st.sampled_from(list(entries)))]
        elif what in KINDS and (0 not in shape and shape or what in ("uniform", "codebook")):
            entries[name] = codes(shape, what, seed=data.draw(st.integers(0, 99)))
        elif what == "constant":
            entries[name] = Constant(torch.tensor(1.5).to(dtype), shape)
        else:
            entries[name] = (torch.randn(shape) * 50).to(dtype)
    compressed = Compressed(entries, data.draw(st.dictionaries(st.text(max_size=5), st.text())))
    loaded = Compressed.from_bytes(compressed.to_bytes())
    assert same(loaded.state_dict(), compressed.state_dict())
    assert loaded.to_bytes() == compressed.to_bytes()
    assert sum(row.bytes for row in loaded.summary()) == loaded.nbytes


def test_overhead_of_a_file_and_of_a_tensor():
    shapes = {f"layer{i // 4}.{i % 4}.conv1.weight": (16, 16, 3, 3) for i in range(40)}
    entries = {name: codes(shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    bound = 256.0
    for entry in entries.values():
        counts = np.bincount((entry.symbols + 50).ravel())
        counts = counts[counts > 0]
        bound += 64 - 1.01 * (counts * np.log2(counts / counts.sum())).sum() / 8
    assert Compressed(entries).nbytes <= bound
    single = Compressed({"weight": Codes(torch.zeros(9, 9).int(), torch.ones(1), "uniform")})
    assert single.nbytes <= 80


def test_special_values_survive():
    raw = torch.tensor([0x7FC00001, -0x800000, 1, -0x80000000], dtype=torch.int64).int()
    entries = {"odd": raw.view(torch.float32), "constant": Constant(torch.tensor(-0.0), (2, 2))}
    loaded = Compressed.from_bytes(Compressed(entries).to_bytes())
    assert same(loaded.state_dict(), Compressed(entries).state_dict())


@pytest.mark.parametrize("shape", [(0,), (1,), (1, 1), (3, 2)])
def test_views_are_stored_as_what_they_show(shape):
    real = torch.tensor(2.5).expand(shape)
    turned = torch.rand(shape).movedim(0, -1)
    entries = {"expanded": real, "conjugate": torch.complex(real, real).conj(), "turned": turned}
    loaded = Compressed.from_bytes(Compressed(entries).to_bytes()).state_dict()
    assert all(torch.equal(loaded[name], entries[name]) for name in entries)


def test_tied_weights_are_stored_once():
    weight = torch.randn(50, 40)
    tied, single = Compressed({"in": weight, "out": weight[:]}), Compressed({"in": weight})
    assert tied.nbytes < single.nbytes + 16
    state = Compressed.from_bytes(tied.to_bytes()).state_dict()
    assert state["in"] is state["out"] and torch.equal(state["in"], weight)
    assert Compressed({"a": weight, "b": weight.T}).nbytes > 2 * weight.nbytes
    shared = codes((50, 40))
    rows = Compressed({"a": shared, "b": shared}).summary()
    assert [row.layer for row in rows] == ["a", "(rest)"]


def test_entries_are_copies(compressed):
    bias = torch.zeros(3)
    held = Compressed({"bias": bias})
    bias += 1
    held.state_dict()["bias"] += 1
    assert torch.equal(held.state_dict()["bias"], torch.zeros(3))
    with pytest.raises(ValueError, match="w: cannot store torch.float8_e5m2"):
        Compressed({"w": torch.zeros(2).to(torch.float8_e5m2)}).to_bytes()
    with pytest.raises(ValueError, match="weight: cannot store a list"):
        Compressed({"weight": [1.0]})


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
def test_a_failed_save_leaves_the_old_file(compressed, tmp_path, monkeypatch, failing):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "model.xaic"
    path.write_bytes(b"old")
    monkeypatch.setattr(failing, full)
    with pytest.raises(OSError, match="No space"):
        compressed.save(path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["model.xaic"]


def test_another_architecture(compressed):
    def message(model):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(CompressedFileError) as caught:
            compressed.to_model(model)
        assert same(model.state_dict(), before)
        return str(caught.value)

    model = network()
    model[4] = nn.Linear(65, 10)
    assert "'4.weight' is [10, 64] in the file, [10, 65] in the model" in message(model)
    assert "the model has no '4.weight'" in message(model[:3])
    assert "the file has no '5.weight'" in message(nn.Sequential(*network(), nn.Linear(10, 2)))
