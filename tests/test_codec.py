"""Compressed: round trips, sizes, atomic saving, damaged and lying files."""

import contextlib
import os
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lib.codec import Compressed, CompressedFileError, Constant, container
from lib.codec.bytestream import Reader, write_int, write_text
from lib.quantize import KINDS, Codes

MUTATIONS = int(os.environ.get("CODEC_MUTATIONS", 1000))


def codes(shape, kind="uniform", seed=0, levels=3):
    """Random codes of the given kind."""
    draw = torch.Generator().manual_seed(seed)
    k = {"uniform": 1, "channel": shape[0] if shape else 1}.get(kind, levels)
    grid = (torch.rand(k, generator=draw) + 0.01).half().float()
    symbols = torch.randn(shape, generator=draw).mul(3).round().int()
    tiers = torch.randint(k, shape, generator=draw).to(torch.uint8) if kind == "tier" else None
    if kind == "codebook":
        grid[0], symbols = 0.0, symbols.abs().clamp(max=k - 1)
    return Codes(symbols, grid, kind, tiers)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)
    )


@pytest.fixture(scope="module")
def compressed():
    entries = dict(network().state_dict())
    entries["0.weight"] = codes((16, 3, 3, 3), "channel")
    entries["4.weight"] = codes((10, 64), "tier")
    entries["4.bias"] = entries["4.bias"].half()
    entries["1.running_mean"] = Constant(torch.tensor(0.0), (16,))
    return Compressed(entries, {"recipe": "lrp-paper"})


def same(first, second):
    """Whether two state_dicts agree in names, their order, dtypes and every bit."""
    return list(first) == list(second) and all(
        a.dtype == b.dtype and a.shape == b.shape and container._raw(a) == container._raw(b)
        for a, b in zip(first.values(), second.values(), strict=True)
    )


def forged(data, edit):
    """The file with its header, inflated, edited and the checksum made to match."""
    reader = Reader(data[len(container.MAGIC) + 1 : -16])
    header = container.zlib.decompress(reader.take(reader.int()))
    deflated = container.zlib.compress(edit(header))
    return sealed(data[:6] + write_int(len(deflated)) + deflated + reader.rest())


def sealed(body):
    return body + container._digest(body)


def rejected(data):
    """The error, after checking that refusing took neither long nor much memory."""
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(CompressedFileError) as caught:
        Compressed.from_bytes(data)
    assert time.perf_counter() - started < 1
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    return str(caught.value)


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
    table = compressed.summary().set_index("layer")
    assert list(table.index) == ["0.weight", "4.weight", "(rest)"]
    assert table["bytes"].sum() == compressed.nbytes and table["share"].sum() == pytest.approx(1)
    assert table.weights["4.weight"] == 640
    assert table.kept["4.weight"] == compressed["4.weight"].decode().count_nonzero()
    assert table["bits per weight"]["4.weight"] == table["bytes"]["4.weight"] * 8 / 640


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
    assert loaded.summary()["bytes"].sum() == loaded.nbytes


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
    assert Compressed({"a": shared, "b": shared}).summary().layer.tolist() == ["a", "(rest)"]


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


def test_foreign_newer_and_damaged_files(compressed, tmp_path):
    data = compressed.to_bytes()
    assert rejected(b"PK\x03\x04" + data) == "not a compressed model file"
    assert "version 2 is newer than 1" in rejected(sealed(data[:5] + b"\x02" + data[6:-16]))
    for cut in (0, 3, 5, 6, 20, len(data) // 2, len(data) - 1):
        assert "checksum does not match" in rejected(data[:cut])
    path = tmp_path / "cut.xaic"
    path.write_bytes(data[:100])
    with pytest.raises(CompressedFileError, match="cut.xaic: .*checksum"):
        Compressed.load(path)


def test_no_mutation_loads_with_wrong_weights(compressed):
    data, rng = compressed.to_bytes(), np.random.default_rng(0)
    slowest = 0.0
    for _ in range(MUTATIONS):
        mutant = bytearray(data)
        start, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
        match rng.integers(5):
            case 0:
                mutant[start] ^= 1 << int(rng.integers(8))
            case 1:
                mutant[start : start + length] = rng.bytes(length)
            case 2:
                del mutant[start : start + length]
            case 3:
                mutant[start:start] = rng.bytes(length)
            case 4:
                del mutant[start:]
        if mutant != data:
            started = time.perf_counter()
            with pytest.raises(CompressedFileError):
                Compressed.from_bytes(mutant)
            slowest = max(slowest, time.perf_counter() - started)
    assert slowest < 1


def test_mutations_with_a_matching_checksum_neither_crash_nor_hang(compressed):
    data, rng = compressed.to_bytes(), np.random.default_rng(1)
    reader = Reader(data[6:-16])
    length = reader.int()
    header = container.zlib.decompress(reader.take(length))
    for i in range(MUTATIONS):
        if i % 2:
            place, value = int(rng.integers(len(header))), bytes(rng.integers(0, 256, 1).tolist())
            mutant = forged(data, lambda h, p=place, v=value: h[:p] + v + h[p + 1 :])
        else:
            place = int(rng.integers(6, len(data) - 16))
            mutant = sealed(data[:place] + rng.bytes(1) + data[place + 1 : -16])
        started = time.perf_counter()
        with contextlib.suppress(CompressedFileError):
            Compressed.from_bytes(mutant).state_dict()
        assert time.perf_counter() - started < 1


HUGE = write_int(1 << 27)
LIES = {
    "dimension": lambda h: h.replace(b"0.weight\0\x04\x10", b"0.weight\0\x04" + HUGE),
    "all dimensions": lambda h: h.replace(b"4.weight\0\x02\x0a\x40", b"4.weight\0\x02" + HUGE * 2),
    "one wide tensor": lambda h: h.replace(b"4.weight\0\x02\x0a\x40", b"4.weight\0\x01" + HUGE),
    "exact tensor": lambda h: h.replace(b"0.bias\x01\x01\x10", b"0.bias\x01\x01" + HUGE),
    "number of dimensions": lambda h: h.replace(b"4.weight\0\x02", b"4.weight\0" + HUGE),
    "number of entries": lambda h: h.replace(b"\x09\x080.weight", HUGE + b"\x080.weight"),
    "grid": lambda h: h.replace(b"\x0a\x40\x02\x03", b"\x0a\x40\x02" + HUGE),
    "name": lambda h: h.replace(b"\x080.weight", HUGE + b"0.weight"),
    "same name": lambda h: h.replace(b"4.weight", b"0.weight"),
    "kind": lambda h: h.replace(b"0.bias\x01", b"0.bias\x09"),
    "kind of codes": lambda h: h.replace(b"\x0a\x40\x02\x03", b"\x0a\x40\x09\x03"),
    "dtype": lambda h: h.replace(b"0.bias\x01\x01\x10\x00", b"0.bias\x01\x01\x10\xee"),
    "alias of itself": lambda h: h.replace(b"0.bias\x01\x01\x10\x00", b"0.bias\x03\x01"),
    "endless header": lambda h: h + bytes(1 << 23),
    "empty header": lambda h: b"",
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_with_a_matching_checksum(compressed, lie):
    data = compressed.to_bytes()
    mutant = forged(data, LIES[lie])
    assert mutant != forged(data, lambda header: header)
    assert rejected(mutant).startswith("malformed: ")


def test_sizes_that_nothing_backs(compressed):
    zeros = Compressed({"w": Codes(torch.zeros(300, 300).int(), torch.ones(1), "uniform")})
    lie = write_text("w") + b"\0\x02" + write_int(300)
    rejected(forged(zeros.to_bytes(), lambda h: h.replace(lie, lie[:-2] + write_int(1 << 18))))
    with pytest.raises(ValueError, match="too large"):
        Compressed({"w": Constant(torch.tensor(0.0), (1 << 15, 1 << 15))}).to_bytes()
