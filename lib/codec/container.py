"""The file format: entries to bytes and back, every stated size checked before it is used.

Magic, version byte, length of the header, header (deflated), payloads in the header's order,
BLAKE2b digest of all bytes before it. Integers are varints, numbers little-endian.
"""

import hashlib
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..codes import KINDS, Codes
from . import entropy
from .bytestream import Reader, write_int, write_text

MAGIC = b"\x93XAIC"
VERSION = 1
FREE_ELEMENTS, ELEMENTS_PER_BYTE = 1 << 28, 1 << 10
"""A file may hold 2**28 elements, over all its entries, or 2**10 for each of its bytes if that is
more. Coded weights never get near the second number (a 128th bit a weight; a hundred times sparser
than pruned networks are), but a constant costs no bytes, whatever shape it states: so what reading
a hostile file can allocate stays in proportion to its length, as with deflate (1032 to one)."""
MAX_ENTRIES = 1 << 16
MAX_HEADER = 1 << 22
MAX_DIMENSIONS = 8

_DIGEST = 16
_CODES, _TENSOR, _CONSTANT, _ALIAS = range(4)
_DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip


class CompressedFileError(ValueError):
    """A file that cannot be trusted, or a model that it does not belong to."""


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor of the given shape whose elements all equal `value`, 0-dimensional, any dtype."""

    value: Tensor
    shape: tuple[int, ...]

    def decode(self) -> Tensor:
        """The whole tensor."""
        return self.value.expand(self.shape).clone()


Entry: TypeAlias = Codes | Tensor | Constant
"""What is stored under one name."""


def shape_of(entry: Entry) -> tuple[int, ...]:
    """Shape of what an entry decodes to, without decoding it."""
    return tuple(entry.symbols.shape if isinstance(entry, Codes) else entry.shape)


def decode(entry: Entry) -> Tensor:
    """What an entry stands for."""
    return entry.clone() if isinstance(entry, Tensor) else entry.decode()


def payload(entry: Entry) -> bytes:
    """What is stored for one entry beside its header fields.

    Grids take two bytes a value, symbols are entropy-coded, tensors stay as they are. ValueError
    for an entry that the format cannot hold.
    """
    shape = shape_of(entry)
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor of shape {list(shape)} has more than {MAX_DIMENSIONS} axes")
    held = getattr(entry, "value", entry)
    if isinstance(held, Tensor) and held.dtype not in _DTYPES:
        raise ValueError(f"cannot store {held.dtype}")
    if isinstance(entry, Constant):
        return b""
    if isinstance(entry, Tensor):
        return _raw(entry)
    tiers, levels = (None, 1) if entry.tiers is None else (entry.tiers.numpy(), len(entry.grid))
    return _raw(entry.grid.half()) + entropy.encode(entry.symbols.numpy(), tiers, levels)


def assemble(
    entries: Mapping[str, Entry], aliases: Mapping[str, str], payloads: Mapping[str, bytes],
    meta: Mapping[str, str],
) -> bytes:  # fmt: skip
    """The whole file; ValueError for more entries or elements than a file may hold.

    `aliases` maps the name of a repeated entry to the earlier one under which it is stored;
    `payloads` are those of all others, in the same order.
    """
    order = {name: index for index, name in enumerate(entries)}
    parts = [write_int(len(meta)), *(write_text(text) for pair in meta.items() for text in pair)]
    parts.append(write_int(len(entries)))
    for name, entry in entries.items():
        parts.append(write_text(name))
        if name in aliases:
            parts.append(bytes([_ALIAS]) + write_int(order[aliases[name]]))
        else:
            parts.append(_describe(entry, len(payloads[name])))
    header = b"".join(parts)
    if len(header) > MAX_HEADER or len(entries) > MAX_ENTRIES:
        raise ValueError(f"{len(entries)} entries are too many for one file")
    deflated = zlib.compress(header, 9)
    body = MAGIC + bytes([VERSION]) + write_int(len(deflated)) + deflated
    body += b"".join(payloads.values())
    size, elements = len(body) + _DIGEST, 0
    for name in payloads:
        elements += _elements(shape_of(entries[name]))
        if elements > _most_elements(size):
            raise ValueError(
                f"{name}: a tensor of shape {list(shape_of(entries[name]))} is too large for a "
                f"file of {size} bytes, which may hold {_most_elements(size)} elements"
            )
    return body + _digest(body)


def parse(data: bytes) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and remarks of a file, aliases as one object under several names.

    CompressedFileError if anything about the bytes is wrong.
    """
    start = len(MAGIC) + 1
    if not MAGIC.startswith(data[: len(MAGIC)]):
        raise CompressedFileError("not a compressed model file")
    if len(data) >= start and data[start - 1] > VERSION:
        raise CompressedFileError(
            f"format version {data[start - 1]} is newer than {VERSION}, the newest known here"
        )
    if len(data) < start + _DIGEST or _digest(data[:-_DIGEST]) != data[-_DIGEST:]:
        raise CompressedFileError("damaged or cut short: the checksum does not match")
    try:
        return _parse(Reader(data[start:-_DIGEST]), _most_elements(len(data)))
    except (ValueError, TypeError, RuntimeError, ArithmeticError, MemoryError, zlib.error) as error:
        raise CompressedFileError(f"malformed: {error}") from error


def _parse(reader: Reader, most: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """All entries from header and payloads; every size is checked before anything is allocated."""
    inflate = zlib.decompressobj()
    header = Reader(inflate.decompress(reader.take(reader.varint()), MAX_HEADER))
    if not inflate.eof or inflate.unused_data:
        raise ValueError("the header is too long or cut short")
    meta = {header.text(): header.text() for _ in range(header.varint())}
    count = header.varint()
    if count > MAX_ENTRIES:
        raise ValueError(f"{count} entries are more than {MAX_ENTRIES}")
    fields = [(header.text(), *_read_fields(header)) for _ in range(count)]
    elements = sum(_elements(shape) for _, kind, shape, *_ in fields if kind != _ALIAS)
    stored = sum(size for *_, size in fields)
    if elements > most or header.rest() or stored != len(reader.data) - reader.position:
        raise ValueError("the stated sizes contradict the file's length")
    entries: dict[str, Entry] = {}
    order: list[Entry] = []
    for name, kind, shape, detail, size in fields:
        if name in entries:
            raise ValueError(f"{name!r} stands twice")
        try:
            if kind == _ALIAS:
                entries[name] = order[detail]
            elif kind == _CONSTANT:
                entries[name] = Constant(detail, shape)
            elif kind == _TENSOR:
                entries[name] = _tensor(reader.take(size), detail, shape)
            else:
                entries[name] = _read_codes(Reader(reader.take(size)), shape, *detail)
        except (ValueError, IndexError) as error:
            raise ValueError(f"{name}: {error}") from error
        order.append(entries[name])
    return entries, meta


def _read_fields(header: Reader) -> tuple[int, tuple[int, ...], Any, int]:
    """Inverse of `_describe`: kind, shape, detail, size of the payload."""
    kind = header.byte()
    if kind == _ALIAS:
        return kind, (0,), header.varint(), 0
    shape = tuple(header.varint() for _ in range(min(header.varint(), MAX_DIMENSIONS + 1)))
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError("a tensor is stated with too many axes")
    if kind == _CODES:
        return kind, shape, (header.varint(), header.varint()), header.varint()
    if kind > _CODES and (code := header.byte()) < len(_DTYPES):
        dtype = _DTYPES[code]
        if kind == _CONSTANT:
            return kind, shape, _tensor(header.take(dtype.itemsize), dtype, ()), 0
        if kind == _TENSOR:
            return kind, shape, dtype, math.prod(shape) * dtype.itemsize
    raise ValueError("an entry of unknown kind")


def _read_codes(reader: Reader, shape: tuple[int, ...], kind: int, levels: int) -> Codes:
    """Inverse of `payload` for codes."""
    grid = _tensor(reader.take(2 * levels), torch.float16, (levels,)).float()
    tiered = KINDS[kind] == "tier"
    symbols, tiers = entropy.decode(reader.rest(), shape, levels if tiered else 1)
    which = torch.from_numpy(tiers) if tiered else None
    return Codes(torch.from_numpy(symbols), grid, KINDS[kind], which)


def _elements(shape: tuple[int, ...]) -> int:
    """Elements of a tensor, an empty axis counted as one: libraries multiply the others as well."""
    return math.prod(length or 1 for length in shape)


def _most_elements(size: int) -> int:
    """Most elements that a file of `size` bytes may hold."""
    return max(FREE_ELEMENTS, ELEMENTS_PER_BYTE * size)


def _describe(entry: Entry, size: int) -> bytes:
    """Header fields of one entry with a payload of `size` bytes."""
    shape = shape_of(entry)
    fields = b"".join(map(write_int, (len(shape), *shape)))
    if isinstance(entry, Codes):
        details = KINDS.index(entry.kind), len(entry.grid), size
        return bytes([_CODES]) + fields + b"".join(map(write_int, details))
    if isinstance(entry, Constant):
        code = _DTYPES.index(entry.value.dtype)
        return bytes([_CONSTANT]) + fields + bytes([code]) + _raw(entry.value)
    return bytes([_TENSOR]) + fields + bytes([_DTYPES.index(entry.dtype)])


def _raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
    # A tensor of one element or none counts as contiguous even with stride 0; its clone has 1.
    flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor from its bytes."""
    if dtype == torch.bool and data.strip(b"\0\1"):
        raise ValueError("a truth value is neither 0 nor 1")
    if not data:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()
