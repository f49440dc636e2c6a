"""Damaged, foreign and lying files: refused, in no time and without much memory.

Time is that of the processor, so that other work on the machine does not count. Memory is bounded
by the kernel, which counts what torch allocates as well as what numpy does: see `xaic_files`.
"""

import os
import time
import tracemalloc

import numpy as np
import pytest
import torch
from xaic_files import ROOM, example, same, tried

from lib.codec import Compressed, CompressedFileError, Constant, container
from lib.codec.bytestream import Reader, write_int, write_text
from lib.quantize import Codes
from study.networks import build
from study.paths import ROOT

MUTATIONS = int(os.environ.get("CODEC_MUTATIONS", 1000))


@pytest.fixture(scope="module")
def compressed():
    return example()


def forged(data, edit):
    """The file with its header, inflated, edited and the checksum made to match."""
    reader = Reader(data[len(container.MAGIC) + 1 : -16])
    header = container.zlib.decompress(reader.take(reader.varint()))
    deflated = container.zlib.compress(edit(header))
    return sealed(data[:6] + write_int(len(deflated)) + deflated + reader.rest())


def sealed(body):
    return body + container._digest(body)


def mutated(data, rng, last):
    """The file with bytes changed, left out or put in somewhere before `last`, or cut there."""
    mutant = bytearray(data)
    start, length = int(rng.integers(last)), int(rng.integers(1, 40))
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
    return mutant


def rejected(data):
    """The error, after checking that refusing took neither long nor much memory."""
    tracemalloc.start()
    error = tried(data)
    assert tracemalloc.get_traced_memory()[1] < ROOM
    tracemalloc.stop()
    assert isinstance(error, CompressedFileError)
    return str(error)


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
    for _ in range(MUTATIONS):
        mutant = mutated(data, rng, len(data))
        assert mutant == data or isinstance(tried(mutant), CompressedFileError)


def test_mutations_with_a_matching_checksum_neither_crash_nor_hang(compressed):
    data, rng = compressed.to_bytes(), np.random.default_rng(1)
    reader = Reader(data[6:-16])
    length = reader.varint()
    header = container.zlib.decompress(reader.take(length))
    for i in range(MUTATIONS):
        if i % 2:
            place, value = int(rng.integers(len(header))), bytes(rng.integers(0, 256, 1).tolist())
            mutant = forged(data, lambda h, p=place, v=value: h[:p] + v + h[p + 1 :])
        else:
            place = int(rng.integers(6, len(data) - 16))
            mutant = sealed(data[:place] + rng.bytes(1) + data[place + 1 : -16])
        tried(mutant)


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


def test_the_most_elements_grow_with_the_file():
    wide = Constant(torch.tensor(0.0), (container.FREE_ELEMENTS + 1,))
    with pytest.raises(ValueError, match="w: a tensor of shape .* is too large for a file of"):
        Compressed({"w": wide}).to_bytes()
    backed = torch.zeros(container.FREE_ELEMENTS // container.ELEMENTS_PER_BYTE + 2**10).byte()
    data = Compressed({"w": wide, "backed": backed}).to_bytes()
    assert Compressed.from_bytes(data)["w"].shape == wide.shape
    assert len(data) * container.ELEMENTS_PER_BYTE < wide.shape[0] + 2**21
    lie = write_int(wide.shape[0])
    for more in (2**21, 2**40):
        claim = write_int(wide.shape[0] + more)
        assert "contradict" in rejected(forged(data, lambda h, c=claim: h.replace(lie, c)))


def test_empty_axes_do_not_hide_a_huge_one(compressed):
    empty = Constant(torch.tensor(0.0), (0, 1 << 20))
    data = Compressed({"w": empty}).to_bytes()
    assert same(Compressed.from_bytes(data).state_dict(), Compressed({"w": empty}).state_dict())
    lie = write_int(1 << 20), write_int(1 << 60)
    assert "contradict" in rejected(forged(data, lambda header: header.replace(*lie)))
    with pytest.raises(ValueError, match="too large"):
        Compressed({"w": Constant(torch.tensor(0.0), (0, 1 << 60))}).to_bytes()
    with pytest.raises(ValueError, match="more than 8 axes"):
        Compressed({"w": torch.zeros(1).reshape([1] * 9)}).to_bytes()


def test_many_alphabets_are_refused_before_they_are_listed():
    levels = 3000
    entry = Codes(
        torch.zeros(4).int(), torch.ones(levels), "tier", torch.zeros(4, dtype=torch.uint8)
    )
    data = Compressed({"w": entry}).to_bytes()
    stream = b"\0" + write_int(1 << 16)  # from 0, as many values as one alphabet may have
    grid = container._raw(entry.grid.half())
    body = grid + levels * stream
    reader = Reader(data[6:-16])
    header = container.zlib.decompress(reader.take(reader.varint()))
    size = write_int(len(reader.rest()))
    assert header.endswith(size)
    deflated = container.zlib.compress(header.removesuffix(size) + write_int(len(body)))
    assert "stated too large" in rejected(
        sealed(data[:6] + write_int(len(deflated)) + deflated + body)
    )


def test_many_tied_entries_load_in_no_time():
    weight = torch.ones(3)
    tied = Compressed({f"{i}": weight for i in range(30_000)})
    started = time.process_time()
    loaded = Compressed.from_bytes(tied.to_bytes())
    assert time.process_time() - started < 1.5 and len(loaded) == 30_000
    assert loaded["29999"] is loaded["0"]


def test_every_byte_is_under_the_checksum(compressed):
    data = compressed.to_bytes()
    for place in range(len(data)):
        mutant = bytearray(data)
        mutant[place] ^= 0x40 if place == len(container.MAGIC) else 1
        with pytest.raises(CompressedFileError) as caught:
            Compressed.from_bytes(mutant)
        assert place < 6 or "checksum does not match" in str(caught.value), place
    older = data[:5] + b"\0" + data[6:]  # no version that there ever was
    with pytest.raises(CompressedFileError, match="checksum does not match"):
        Compressed.from_bytes(older)


def test_nothing_may_stand_behind_the_end(compressed):
    data = compressed.to_bytes()
    assert "contradict the file's length" in rejected(sealed(data[:-16] + b"\0"))
    assert "contradict the file's length" in rejected(forged(data, lambda h: h + b"\0"))
    for more in (b"\0", data[-16:], data):
        assert "checksum does not match" in rejected(data + more)


REAL = sorted((ROOT / "results" / "quick" / "models").glob("digits-resnet8-*.xaic"))
LARGER = [ROOT / "results/quick/models/digits-lenet5-s0-lrp-pruned.xaic"]


def shapes(entries):
    return {name: tuple(container.shape_of(entry)) for name, entry in entries.items()}


def decoded(loaded, network):
    """Decode all, and into the network if that is what the file holds."""
    there, state = shapes(loaded), loaded.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == there
    if there == {name: tuple(value.shape) for name, value in network.state_dict().items()}:
        loaded.to_model(network)


def test_mutations_of_real_files_give_an_error_or_the_stated_shapes():
    """Half of them by a hostile writer, who makes the checksum right again."""
    rng, outcomes = np.random.default_rng(2), {"refused": 0, "loaded": 0}
    files = {path: path.read_bytes() for path in [*REAL, *LARGER]}
    assert len(files) > 2
    networks = {"resnet8": build("resnet8"), "lenet5": build("lenet5")}
    for number in range(MUTATIONS):
        path = LARGER[0] if number % 50 == 0 else REAL[number % len(REAL)]
        hostile = number % 2 == 0
        mutant = mutated(files[path], rng, last=len(files[path]) - 16 * hostile)
        mutant = sealed(bytes(mutant[: len(mutant) - 16])) if hostile else bytes(mutant)
        network = networks[path.name.split("-")[1]]
        found = tried(mutant, lambda loaded, n=network: decoded(loaded, n))
        assert found is None or "\n" not in str(found)
        outcomes["loaded" if found is None else "refused"] += 1
        assert found or hostile or mutant == files[path]
    assert min(outcomes.values()) > 0.02 * MUTATIONS
