"""Adaptive entropy coding of weight symbols: no table is stored, both sides count alike."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from .bytestream import Reader, write_int
from .contexts import MAX_CLASSES, biclusters
from .priors import PRIORS, UNIT, best_prior, candidates, prior

Symbols = NDArray[np.int32]
Counts = NDArray[np.int64]

MAX_ALPHABET = 1 << 16
"""Most values that the symbols of one tensor may span."""
FREE_WEIGHTS, WEIGHTS_PER_BYTE = 1 << 20, 1 << 16
"""Weights beyond the first 2**20 take at least a byte per 2**16, so that no size can be claimed
for nothing."""

_FLOOR = 2.0**-22
_SLACK = 128.0


def encode(symbols: Symbols, tiers: NDArray[np.uint8] | None = None, levels: int = 1) -> bytes:
    """Code the symbols of one tensor, and its tiers with them as pairs.

    Symbols are int32 of any shape, tiers uint8 of the same shape and below `levels`. ValueError if
    the symbols span more than :data:`MAX_ALPHABET` values.

    Notes
    -----
    Every block of :func:`.contexts.biclusters` is coded in chunks by a range coder. The
    probabilities are ``p(s) ∝ n(s) + a π(s)``: n counts the block's earlier chunks, π is a Student
    t of which scale, tails and weight a take one byte. All is integer arithmetic, so that every
    machine decodes alike.

    References
    ----------
    Bamler 2022, "Understanding entropy coding with asymmetric numeral systems (ANS)",
    arXiv 2201.01741 (constriction). Wiedemann et al. 2020, "DeepCABAC", arXiv 1907.11900.
    """
    groups = [symbols] if tiers is None else [symbols[tiers == t] for t in range(levels)]
    bounds = [(int(g.min()), int(g.max()) + 1) if g.size else (0, 0) for g in groups]
    widths = [stop - low for low, stop in bounds]
    if sum(widths) > MAX_ALPHABET:
        raise ValueError(f"symbols span more than {MAX_ALPHABET} values: {bounds}")
    stream = b"".join(
        write_int(2 * low if low >= 0 else -2 * low - 1) + write_int(stop - low)
        for low, stop in bounds
    )
    if sum(widths) > 1:
        offsets = np.cumsum([0, *widths[:-1]]) - [low for low, _ in bounds]
        offsets = offsets.astype(np.int32)
        indices = symbols + (offsets[0] if tiers is None else offsets[tiers])
        stream += _encode_blocks(indices.reshape(_matrix_shape(indices.shape)), _values(bounds))
    return stream.ljust(_least_bytes(symbols.size), b"\0")


def decode(data: bytes, shape: Sequence[int], levels: int = 1) -> tuple[Symbols, NDArray[np.uint8]]:
    """Inverse of :func:`encode`: symbols, int32, and tiers, uint8, of the given shape.

    ValueError if stream, shape and levels do not belong together.
    """
    reader, count, bounds, alphabet = Reader(data), math.prod(shape), [], 0
    for _ in range(levels):
        low, width = reader.varint(), reader.varint()
        low = low // 2 if low % 2 == 0 else -(low + 1) // 2
        alphabet += width
        if alphabet > MAX_ALPHABET or not -(2**31) <= low <= 2**31 - max(width, 1):
            raise ValueError("symbols are stated too large")
        bounds.append((low, low + width))
    if len(data) < _least_bytes(count):
        raise ValueError("more weights are stated than were coded")
    values = _values(bounds)
    if count and not alphabet:
        raise ValueError("the alphabet is stated empty")
    owners = np.repeat(np.arange(levels), [stop - low for low, stop in bounds]).astype(np.uint8)
    if not count:
        return np.zeros(shape, np.int32), np.zeros(shape, np.uint8)
    if len(values) > 1:
        indices = _decode_blocks(reader, _matrix_shape(shape), values).reshape(shape)
        return values.astype(np.int32)[indices], owners[indices]
    return np.full(shape, values[0], np.int32), np.full(shape, owners[0], np.uint8)


def _encode_blocks(matrix: Symbols, values: Counts) -> bytes:
    """Header byte, priors and words of a matrix of indices into `values`."""
    coder, classes = _Encoder(), biclusters(matrix, values)
    sizes = [1 << int(groups.max()).bit_length() for groups in classes]
    for groups, size in zip(classes, sizes, strict=True):
        if size > 1:
            _transcode(coder, groups, len(groups), _flat(size))
    rows, columns = (np.argsort(groups, kind="stable") for groups in classes)
    matrix = matrix[np.ix_(rows, columns)]
    edges = [
        np.searchsorted(np.sort(groups), range(size + 1))
        for groups, size in zip(classes, sizes, strict=True)
    ]
    known, codes = candidates(values, np.bincount(matrix.ravel())), bytearray()
    for top, bottom in itertools.pairwise(edges[0]):
        for left, right in itertools.pairwise(edges[1]):
            symbols = matrix[top:bottom, left:right].ravel()
            codes.append(best_prior(known, np.bincount(symbols, minlength=len(values))))
            _transcode(coder, symbols, len(symbols), prior(values, codes[-1]))
    return bytes([sizes[0] << 4 | sizes[1], *codes]) + coder.finish()


def _decode_blocks(reader: Reader, shape: tuple[int, int], values: Counts) -> Symbols:
    """Inverse of `_encode_blocks`; memory grows only as blocks prove to be there."""
    sizes = divmod(reader.byte(), 16)
    if not all(size in (1, 2, 4, MAX_CLASSES) for size in sizes):
        raise ValueError("unknown contexts")
    codes = reader.take(sizes[0] * sizes[1])
    if max(codes) >= PRIORS:
        raise ValueError("unknown prior")
    priors = iter(codes)
    coder = _Decoder(reader.rest())
    classes = [
        _transcode(coder, None, length, _flat(size)) if size > 1 else None
        for length, size in zip(shape, sizes, strict=True)
    ]
    heights, widths = (
        [length] if groups is None else np.bincount(groups, minlength=size)
        for groups, length, size in zip(classes, shape, sizes, strict=True)
    )
    blocks = [
        [_transcode(coder, None, m * n, prior(values, next(priors))).reshape(m, n) for n in widths]
        for m in heights
    ]
    coder.finish()
    orders = (
        np.arange(length) if groups is None else np.argsort(groups, kind="stable")
        for groups, length in zip(classes, shape, strict=True)
    )
    matrix = np.empty(shape, np.int32)
    matrix[np.ix_(*orders)] = np.block(blocks)
    return matrix


def _transcode(
    coder: "_Encoder | _Decoder", symbols: Symbols | None, count: int, table: Counts
) -> Symbols:
    """Run `coder` over `count` symbols in growing chunks; the table follows what was coded."""
    parts, done = [np.zeros(0, np.int32)], 0
    while done < count:
        size = min(max(16, done // 2), count - done)
        chunk = None if symbols is None else symbols[done : done + size]
        parts.append(coder.code(chunk, size, table))
        seen = np.bincount(parts[-1], minlength=len(table))
        coder.account(seen, table)
        table = table + UNIT * seen
        done += size
    return np.concatenate(parts)


class _Encoder:
    """Range encoder, called like the decoder."""

    def __init__(self) -> None:
        self.coder = constriction.stream.queue.RangeEncoder()

    def code(self, symbols: Symbols | None, count: int, table: Counts) -> Symbols:
        assert symbols is not None
        self.coder.encode(symbols, _model(table))
        return symbols

    def account(self, seen: Counts, table: Counts) -> None:
        """All is known of what is encoded."""

    def finish(self) -> bytes:
        """The words, big-endian, without up to three zero bytes at their end."""
        data = self.coder.get_compressed().astype(">u4").tobytes()
        return data[:-3] + data[-3:].rstrip(b"\0")


class _Decoder:
    """Range decoder that keeps account: past its data's end it would invent symbols for ever."""

    def __init__(self, data: bytes) -> None:
        words = np.frombuffer(data + bytes(-len(data) % 4), dtype=">u4").astype(np.uint32)
        self.coder = constriction.stream.queue.RangeDecoder(words)
        self.stored, self.used = 8.0 * len(data), 0.0

    def code(self, symbols: Symbols | None, count: int, table: Counts) -> Symbols:
        try:
            return self.coder.decode(_model(table), count)
        except AssertionError:
            raise ValueError("coded symbols are malformed") from None

    def account(self, seen: Counts, table: Counts) -> None:
        self.used -= float((seen * np.log2(table / table.sum() + _FLOOR)).sum())
        if self.used > self.stored + _SLACK:
            raise ValueError("more weights are stated than were coded")

    def finish(self) -> None:
        """Complain about data that no symbol needed."""
        if self.stored > 1.1 * self.used + _SLACK and not self.coder.maybe_exhausted():
            raise ValueError("fewer weights are stated than were coded")


def _model(table: Counts) -> Any:
    return constriction.stream.model.Categorical(table.astype(np.float64), perfect=False)


def _flat(size: int) -> Counts:
    return np.full(size, UNIT // 2)


def _values(bounds: list[tuple[int, int]]) -> Counts:
    return np.concatenate([np.arange(low, stop) for low, stop in bounds])


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _least_bytes(count: int) -> int:
    return max(count - FREE_WEIGHTS, 0) // WEIGHTS_PER_BYTE
