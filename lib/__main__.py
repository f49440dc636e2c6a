"""The command line: look into compressed files, and compare two of them."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .codec import Compressed, CompressedFileError
from .codec.container import Entry, decode, shape_of
from .codec.summary import aligned
from .codes import Codes

INSPECT = """For each quantized weight: the kind of its codes with the number of grid values, its
shape, the weights kept, bits a weight, bytes and share of the file; then all other entries, remarks
and the total."""

DIFF = """For each entry that is not the same in both files: how it is stored, its bytes in either
(- where a file lacks it), the symbols and decoded weights that differ, and by how much at most;
then remarks and totals. The exit status is 0 whether the files differ or not."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, by default with the arguments of the process.

    Exit status: 0, or 1 after one sentence on stderr about a file that cannot be read.
    """
    parser = argparse.ArgumentParser("xai-compression", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="what a file holds", description=INSPECT)
    inspect.add_argument("files", nargs=1, metavar="FILE.xaic", type=Path)
    inspect.set_defaults(lines=_inspect)
    diff = commands.add_parser("diff", help="what differs between two", description=DIFF)
    diff.add_argument("files", nargs=2, metavar="FILE.xaic", type=Path)
    diff.set_defaults(lines=_diff)
    arguments = parser.parse_args(argv)
    try:
        lines = [*arguments.lines(*map(Compressed.load, arguments.files))]
    except CompressedFileError as error:
        print(f"xai-compression: {_plain(str(error))}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"xai-compression: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


def _inspect(compressed: Compressed) -> Iterator[str]:
    """Lines about one file."""
    *layers, rest = compressed.summary()
    entries = _entries(compressed)
    table: list[tuple[str, ...]] = []
    for row in layers:
        kind, shape, size = entries.pop(row.layer)
        numbers = f"{row.bits:.3f}", f"{size:,}", f"{row.share:.1%}"
        kept = f"{row.kept:,} of {row.weights:,}"
        table.append((_plain(row.layer), kind, shape, kept, *numbers))
    columns = "layer", "codes", "shape", "kept", "bits a weight", "bytes", "share"
    yield aligned(columns, table, left=3) + "\n"
    table = [(_plain(name), *texts, f"{size:,}") for name, (*texts, size) in entries.items()]
    yield aligned(("rest", "stored as", "shape", "bytes"), table, left=3) + "\n"
    yield from (f"{_plain(key)}: {_plain(value)}" for key, value in compressed.meta.items())
    header = rest.bytes - sum(size for *_, size in entries.values())
    yield f"{compressed.nbytes:,} bytes, {header:,} of them for names, shapes and remarks"


def _diff(one: Compressed, two: Compressed) -> Iterator[str]:
    """Lines about what differs between two files."""
    entries, table, names = (_entries(one), _entries(two)), [], dict.fromkeys([*one, *two])
    for name in names:
        found = _differences(one.get(name), two.get(name))
        kinds, shapes, sizes = zip(*(e.get(name, ("-", "-", "-")) for e in entries), strict=True)
        if any(found) or any(first != second for first, second in (kinds, shapes, sizes)):
            texts = [" / ".join(dict.fromkeys(pair)) for pair in (kinds, shapes)]
            numbers = (size if size == "-" else f"{size:,}" for size in sizes)
            table.append((_plain(name), *texts, *numbers, *found))
    columns = "bytes", "bytes", "symbols differ", "weights differ", "by at most"
    yield aligned(("entry", "stored as", "shape", *columns), table, left=3) + "\n"
    for key in dict.fromkeys([*one.meta, *two.meta]):
        first, second = (_plain(file.meta.get(key, "-")) for file in (one, two))
        if first != second:
            yield f"{_plain(key)}: {first} / {second}"
    yield f"{len(names) - len(table)} of {len(names)} entries are the same"
    yield f"{one.nbytes:,} bytes / {two.nbytes:,} bytes"


def _differences(one: Entry | None, two: Entry | None) -> tuple[str, str, str]:
    """Symbols that differ, decoded weights that differ, by how much; empty where none do."""
    if one is None or two is None or shape_of(one) != shape_of(two):
        return "", "", ""
    symbols = 0
    if isinstance(one, Codes) and isinstance(two, Codes):
        symbols = int((one.symbols != two.symbols).sum())
    a, b = (_wide(decode(entry)) for entry in (one, two))
    apart = (a != b) & ~(a.isnan() & b.isnan())
    largest = f"{float((a - b)[apart].abs().max()):.3g}" if apart.any() else ""
    return _count(symbols), _count(int(apart.sum())), largest


def _entries(compressed: Compressed) -> dict[str, tuple[str, str, int]]:
    """How each entry is stored, its shape, and the bytes of its content."""
    sizes = {row.layer: row.bytes for row in compressed.summary()[:-1]}
    found: dict[str, tuple[str, str, int]] = {}
    owners: dict[int, str] = {}
    for name, entry in compressed.items():
        shape = "x".join(map(str, shape_of(entry))) or "scalar"
        owner = owners.setdefault(id(entry), name)
        if owner != name:
            kind, size = f"same as {_plain(owner)}", 0
        elif isinstance(entry, Codes):
            kind, size = f"{entry.kind}, grid of {len(entry.grid)}", sizes[name]
        elif isinstance(entry, Tensor):
            kind, size = f"{entry.dtype}", entry.numel() * entry.element_size()
        else:
            kind, size = f"{entry.value.dtype}, all equal", 0
        found[name] = kind.removeprefix("torch."), shape, size
    return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _count(number: int) -> str:
    return f"{number:,}" if number else ""


def _plain(text: str) -> str:
    """Text of a file that may be foreign, without what a terminal would obey."""
    return "".join(char if char.isprintable() else "?" for char in text)


if __name__ == "__main__":
    sys.exit(main())
