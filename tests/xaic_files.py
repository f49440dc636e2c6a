"""Codes, a compressed model, equality bit by bit, and decoding within bounds, for several tests."""

import contextlib
import math
import resource
import sys
import time
import zlib

import torch
from torch import nn

from lib.codec import Compressed, CompressedFileError, Constant, container
from lib.codec.bytestream import Reader
from lib.quantize import Codes

ROOM = 64 << 20  # bytes for what has no stated size: headers, tables of the entropy coder
BYTES = 40  # for each element that is stated: symbols, their order, tiers and decoded values
PAGE = resource.getpagesize()


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
    """The architecture of :func:`example`."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)
    )


def example():
    """Codes of two kinds, a constant, float16, and tensors as they are."""
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


@contextlib.contextmanager
def room(more):
    """So many bytes, and none beyond them, for what is allocated meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":  # others do not say how much a process has, or keep to no limit
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * PAGE
        resource.setrlimit(resource.RLIMIT_AS, (held + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def stated(data):
    """How many elements the header states; none where it cannot be read, or states too many."""
    reader = Reader(bytes(data[6:-16]))
    try:
        header = Reader(zlib.decompress(reader.take(reader.varint())))
        for _ in range(2 * header.varint()):
            header.text()
        shapes_of = []
        for _ in range(header.varint()):
            header.text()
            kind, shape, *_ = container._read_fields(header)
            shapes_of.append(shape if kind != container._ALIAS else (0,))
    except (ValueError, RuntimeError, zlib.error):
        return 0
    elements = sum(math.prod(shape) for shape in shapes_of)
    return elements if elements <= container._most_elements(len(data)) else 0


def tried(data, use=Compressed.state_dict):
    """What `use` makes of the file, or the error that refuses it.

    Checks that it took neither a second nor more memory than the stated sizes allow.
    """
    started = time.process_time()
    with room(ROOM + BYTES * stated(data)):
        try:
            result = use(Compressed.from_bytes(data))
        except CompressedFileError as error:
            result = error
            why = error.__cause__
            assert not isinstance(why, MemoryError) and "allocate" not in str(why), why
    assert time.process_time() - started < 1
    return result
