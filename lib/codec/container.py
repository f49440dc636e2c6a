"""The file format: entries to bytes and back, every stated size checked before it is used.

Magic, version byte, length of the header, header (deflated), payloads in the header's order,
BLAKE2b digest of all bytes before it. Integers are varints, numbers little-endian.
"""

import hashlib
import math
import zlib
from dataclasses import dataclass

import torch

from lib.codec import entropy
from lib.codec.bytestream import Reader, write_int, write_text
from lib.quantize import KINDS, Codes

MAGIC = b"\x93XAIC"
VERSION = 1
MAX_ELEMENTS = 1 << 28
"""Most elements that one file may hold, over all its entries."""
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
    """A tensor of equal elements, stored as one of them.

    Parameters
    ----------
    value : Tensor
        The element, 0-dimensional, any dtype.
    shape : tuple of int
        Shape of the whole.
    """

    value: torch.Tensor
    shape: tuple

    def decode(self):
        """The whole tensor."""
        return self.value.expand(self.shape).clone()


def shape_of(entry):
    """Shape of what an entry decodes to, without decoding it."""
    return tuple(entry.symbols.shape if isinstance(entry, Codes) else entry.shape)


def payload(entry):
    """What is stored for one entry beside its header fields.

    Parameters
    ----------
    entry : Codes, Tensor or Constant
        Grids take two bytes a value, codes are entropy-coded, tensors stay as they are.

    Returns
    -------
    bytes

    Raises
    ------
    ValueError
        For an entry that the format cannot hold.
    """
    shape = shape_of(entry)
    if len(shape) > MAX_DIMENSIONS or math.prod(d or 1 for d in shape) > MAX_ELEMENTS:
        raise ValueError(f"a tensor of shape {list(shape)} is too large")
    held = getattr(entry, "value", entry)
    if isinstance(held, torch.Tensor) and held.dtype not in _DTYPES:
        raise ValueError(f"cannot store {held.dtype}")
    if isinstance(entry, Constant):
        return b""
    if isinstance(entry, torch.Tensor):
        return _raw(entry)
    pairs = () if entry.tiers is None else (entry.tiers.numpy(), len(entry.grid))
    return _raw(entry.grid.half()) + entropy.encode(entry.symbols.numpy(), *pairs)


def assemble(entries, aliases, payloads, meta):
    """The whole file.

    Parameters
    ----------
    entries : dict of str to Codes, Tensor or Constant
        In the order in which they are stored.
    aliases : dict of str to str
        Name of a repeated entry to the earlier name under which it is stored.
    payloads : dict of str to bytes
        Of every entry that is not an alias, in the same order.
    meta : dict of str to str
        Short remarks.

    Returns
    -------
    bytes
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
    elements = sum(math.prod(shape_of(entries[name])) for name in payloads)
    if len(header) > MAX_HEADER or len(entries) > MAX_ENTRIES or elements > MAX_ELEMENTS:
        raise ValueError("too many entries or elements for one file")
    deflated = zlib.compress(header, 9)
    body = MAGIC + bytes([VERSION]) + write_int(len(deflated)) + deflated
    body += b"".join(payloads.values())
    return body + _digest(body)


def parse(data):
    """Inverse of :func:`assemble`.

    Parameters
    ----------
    data : bytes
        A whole file.

    Returns
    -------
    entries, meta : dict
        Aliases are the same object under several names.

    Raises
    ------
    CompressedFileError
        If anything about the bytes is wrong.
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
        return _parse(Reader(data[start:-_DIGEST]))
    except (ValueError, TypeError, RuntimeError, ArithmeticError, MemoryError, zlib.error) as error:
        raise CompressedFileError(f"malformed: {error}") from error


def _parse(reader):
    """All entries from header and payloads; every size is checked before anything is allocated."""
    inflate = zlib.decompressobj()
    header = Reader(inflate.decompress(reader.take(reader.int()), MAX_HEADER))
    if not inflate.eof or inflate.unused_data:
        raise ValueError("the header is too long or cut short")
    meta = {header.text(): header.text() for _ in range(header.int())}
    count = header.int()
    if count > MAX_ENTRIES:
        raise ValueError(f"{count} entries are more than {MAX_ENTRIES}")
    fields = [(header.text(), *_read_fields(header)) for _ in range(count)]
    elements = sum(math.prod(shape) for _, _, shape, *_ in fields)
    stored = sum(size for *_, size in fields)
    if elements > MAX_ELEMENTS or header.rest() or stored != len(reader.data) - reader.position:
        raise ValueError("the stated sizes contradict the file's length")
    entries = {}
    for name, kind, shape, detail, size in fields:
        if name in entries:
            raise ValueError(f"{name!r} stands twice")
        try:
            if kind == _ALIAS:
                entries[name] = list(entries.values())[detail]
            elif kind == _CONSTANT:
                entries[name] = Constant(detail, shape)
            elif kind == _TENSOR:
                entries[name] = _tensor(reader.take(size), detail, shape)
            else:
                entries[name] = _read_codes(Reader(reader.take(size)), shape, *detail)
        except (ValueError, IndexError) as error:
            raise ValueError(f"{name}: {error}") from error
    return entries, meta


def _read_fields(header):
    """Inverse of `_describe`: kind, shape, detail, size of the payload."""
    kind = header.byte()
    if kind == _ALIAS:
        return kind, (0,), header.int(), 0
    shape = tuple(header.int() for _ in range(min(header.int(), MAX_DIMENSIONS + 1)))
    if len(shape) > MAX_DIMENSIONS or math.prod(d or 1 for d in shape) > MAX_ELEMENTS:
        raise ValueError("a tensor is stated too large")
    if kind == _CODES:
        return kind, shape, (header.int(), header.int()), header.int()
    if kind > _CODES and (code := header.byte()) < len(_DTYPES):
        dtype = _DTYPES[code]
        if kind == _CONSTANT:
            return kind, shape, _tensor(header.take(dtype.itemsize), dtype, ()), 0
        if kind == _TENSOR:
            return kind, shape, dtype, math.prod(shape) * dtype.itemsize
    raise ValueError("an entry of unknown kind")


def _read_codes(reader, shape, kind, levels):
    """Inverse of `payload` for codes."""
    grid = _tensor(reader.take(2 * levels), torch.float16, (levels,)).float()
    tiered = KINDS[kind] == "tier"
    symbols, tiers = entropy.decode(reader.rest(), shape, levels if tiered else 1)
    tiers = torch.from_numpy(tiers) if tiered else None
    return Codes(torch.from_numpy(symbols), grid, KINDS[kind], tiers)


def _describe(entry, size):
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


def _raw(tensor):
    """The bytes of a tensor."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
    # A tensor of one element or none counts as contiguous even with stride 0; its clone has 1.
    flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes()


def _tensor(data, dtype, shape):
    """A tensor from its bytes."""
    if dtype == torch.bool and data.strip(b"\0\1"):
        raise ValueError("a truth value is neither 0 nor 1")
    if not data:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def _digest(data):
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()
