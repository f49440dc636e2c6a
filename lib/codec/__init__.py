"""Compressed models: what a file holds, saved, loaded and put back into a model."""

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from ..checks import check_model
from ..codes import Codes
from ..files import write_bytes
from ..inputs import copied, tensors_of, unwrapped
from . import container
from .container import CompressedFileError, Constant, Entry, shape_of
from .summary import LayerSummary, Summary

__all__ = ["Compressed", "CompressedFileError", "Constant", "LayerSummary", "Summary"]


class Compressed(Mapping[str, Entry]):
    """A compressed model: the names of its state_dict and what is stored for each.

    Parameters
    ----------
    entries : Mapping of str to Codes, Tensor or Constant
        One for each name in the model's state_dict. Codes are entropy-coded. Tensors are stored
        bit by bit in their own dtype; a bias in float16 takes half, and `to_model` casts it to
        the model's dtype. One entry under several names, or tensors that share their storage
        (tied weights), are stored once.
    meta : Mapping of str to str, optional
        Short remarks, such as the recipe's name.

    Raises
    ------
    ValueError
        For an entry that is none of these.

    Notes
    -----
    Tensors are copied: training on with the model that they came from changes nothing here.
    """

    def __init__(self, entries: Mapping[str, Entry], meta: Mapping[str, str] | None = None) -> None:
        self.meta = {str(key): str(value) for key, value in (meta or {}).items()}
        self._entries: dict[str, Entry] = {}
        self._aliases: dict[str, str] = {}
        first: dict[object, str] = {}
        for name, entry in entries.items():
            if not isinstance(entry, Codes | Tensor | Constant):
                raise ValueError(f"{name}: cannot store a {type(entry).__name__}")
            owner = first.setdefault(identity(entry), name)
            if owner != name:
                self._aliases[name], entry = owner, self._entries[owner]
            elif isinstance(entry, Tensor):
                entry = entry.detach().cpu().clone()
            self._entries[name] = entry

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @cached_property
    def _payloads(self) -> dict[str, bytes]:
        payloads = {}
        for name, entry in self.items():
            if name not in self._aliases:
                try:
                    payloads[name] = container.payload(entry)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        return payloads

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return len(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The file's content; ValueError for what the format cannot hold."""
        return container.assemble(self._entries, self._aliases, self._payloads, self.meta)

    def save(self, path: str | Path) -> int:
        """Write the file, whole or not at all: on any error an older file stays as it was.

        Returns the file's size in bytes.
        """
        path, data = Path(path), self.to_bytes()
        write_bytes(path, data)
        return len(data)

    @classmethod
    def load(cls, path: str | Path) -> "Compressed":
        """Read a file written by :meth:`save`; decodes to the same bits as what was saved.

        Raises
        ------
        CompressedFileError
            If the file is foreign, newer or damaged; the message says which.
        """
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except CompressedFileError as error:
            raise CompressedFileError(f"{path}: {error}") from error

    @classmethod
    def from_bytes(cls, data: bytes | bytearray) -> "Compressed":
        """Inverse of :meth:`to_bytes`; raises as :meth:`load` does."""
        return cls(*container.parse(bytes(data)))

    def state_dict(self) -> dict[str, Tensor]:
        """Decoded tensors by name; tied weights are one tensor under several names."""
        decoded: dict[str, Tensor] = {}
        for name, entry in self.items():
            owner = self._aliases.get(name)
            decoded[name] = decoded[owner] if owner is not None else container.decode(entry)
        return decoded

    def to_model(self, model: nn.Module) -> nn.Module:
        """The decoded weights in the user's architecture.

        Parameters
        ----------
        model : nn.Module
            The architecture; stays as it is. Inside of DataParallel or torch.compile the network
            itself is meant.

        Returns
        -------
        nn.Module
            A copy with all parameters and buffers from here, in the model's dtypes, on its device.

        Raises
        ------
        CompressedFileError
            For a model with other names or shapes; the message gives the first.
        ValueError, UnsupportedLayerError
            For what is no ``nn.Module``, or a compiled one.
        """
        check_model(model)
        model = unwrapped(model)
        expected = tensors_of(model)
        for name, tensor in expected.items():
            if name not in self:
                raise CompressedFileError(f"another architecture: the file has no {name!r}")
            stored, wanted = list(shape_of(self[name])), list(tensor.shape)
            if stored != wanted:
                raise CompressedFileError(
                    f"another architecture: {name!r} is {stored} in the file, {wanted} in the model"
                )
        if surplus := [name for name in self if name not in expected]:
            raise CompressedFileError(f"another architecture: the model has no {surplus[0]!r}")
        model = copied(model)
        own = model.state_dict()
        own.update(self.state_dict())  # which keeps its metadata, and extra state that is no tensor
        model.load_state_dict(own)
        return model

    def summary(self) -> Summary:
        """What each layer takes in the file.

        A row for each quantized weight and ``(rest)`` for all other entries and the header; the
        bytes add up to the file's size. Weights stored under several names count once.
        """
        sizes = {n: len(p) for n, p in self._payloads.items() if isinstance(self[n], Codes)}
        rest = [name for name in self._payloads if name not in sizes]
        total, rows = self.nbytes, Summary()
        groups = [(name, [name], size) for name, size in sizes.items()]
        groups.append(("(rest)", rest, total - sum(sizes.values())))
        for label, names, size in groups:
            weights = sum(math.prod(shape_of(self[name])) for name in names)
            kept = sum(_kept(self[name]) for name in names)
            bits = 8 * size / weights if weights else math.nan
            rows.append(LayerSummary(label, weights, kept, bits, size, size / total))
        return rows


def _kept(entry: Entry) -> int:
    """How many elements decode to other than zero: without decoding, a constant may be huge."""
    if isinstance(entry, Constant):
        return math.prod(entry.shape) * bool(entry.value != 0)
    return int((entry.symbols if isinstance(entry, Codes) else entry).count_nonzero())


def identity(entry: Entry) -> object:
    """Equal for entries that need storing once only."""
    if not isinstance(entry, Tensor) or not entry.numel():
        return id(entry)
    return entry.data_ptr(), entry.dtype, entry.shape, entry.stride(), entry.device
