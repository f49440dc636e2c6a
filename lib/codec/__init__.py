"""Compressed models: what a file holds, saved, loaded and put back into a model."""

import copy
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch

from lib.codec.container import CompressedFileError, Constant, assemble, parse, payload, shape_of
from lib.files import write_bytes
from lib.quantize import Codes

__all__ = ["Compressed", "CompressedFileError", "Constant"]


class Compressed(Mapping):
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

    def __init__(self, entries, meta=None):
        self.meta = {str(key): str(value) for key, value in (meta or {}).items()}
        self._entries, self._aliases, first = {}, {}, {}
        for name, entry in entries.items():
            if not isinstance(entry, Codes | torch.Tensor | Constant):
                raise ValueError(f"{name}: cannot store a {type(entry).__name__}")
            owner = first.setdefault(_identity(entry), name)
            if owner != name:
                self._aliases[name], entry = owner, self._entries[owner]
            elif isinstance(entry, torch.Tensor):
                entry = entry.detach().cpu().clone()
            self._entries[name] = entry

    def __getitem__(self, name):
        return self._entries[name]

    def __iter__(self):
        return iter(self._entries)

    def __len__(self):
        return len(self._entries)

    @cached_property
    def _payloads(self):
        payloads = {}
        for name, entry in self.items():
            if name not in self._aliases:
                try:
                    payloads[name] = payload(entry)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        return payloads

    @property
    def nbytes(self):
        """Size of the file in bytes."""
        return len(self.to_bytes())

    def to_bytes(self):
        """The file's content; ValueError for what the format cannot hold."""
        return assemble(self._entries, self._aliases, self._payloads, self.meta)

    def save(self, path):
        """Write the file, whole or not at all: on any error an older file stays as it was.

        Parameters
        ----------
        path : str or Path
            Where to.

        Returns
        -------
        int
            The file's size in bytes.
        """
        path, data = Path(path), self.to_bytes()
        write_bytes(path, data)
        return len(data)

    @classmethod
    def load(cls, path):
        """Read a file written by :meth:`save`.

        Parameters
        ----------
        path : str or Path
            Where from.

        Returns
        -------
        Compressed
            Decodes to the same bits as the one that was saved.

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
    def from_bytes(cls, data):
        """Inverse of :meth:`to_bytes`; raises as :meth:`load` does."""
        return cls(*parse(bytes(data)))

    def state_dict(self):
        """Decoded tensors by name; tied weights are one tensor under several names."""
        decoded = {}
        for name, entry in self.items():
            owner = self._aliases.get(name)
            decoded[name] = decoded[owner] if owner is not None else _decode(entry)
        return decoded

    def to_model(self, model):
        """The decoded weights in the user's architecture.

        Parameters
        ----------
        model : torch.nn.Module
            The architecture; stays as it is.

        Returns
        -------
        torch.nn.Module
            A copy with all parameters and buffers from here, in the model's dtypes and on its
            device.

        Raises
        ------
        CompressedFileError
            For a model with other names or shapes; the message gives the first.
        """
        expected = model.state_dict()
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
        model = copy.deepcopy(model)
        model.load_state_dict(self.state_dict())
        return model

    def summary(self):
        """What each layer takes in the file.

        Returns
        -------
        DataFrame
            layer, weights, kept (decoded to other than zero), bits per weight, bytes, share of
            the file: a row for each quantized weight and ``(rest)`` for all other entries and the
            header. The bytes add up to the file's size.
        """
        layers = [name for name in self._payloads if isinstance(self[name], Codes)]
        groups = {name: [name] for name in layers}
        groups["(rest)"] = [name for name in self._payloads if name not in groups]
        total, rows = self.nbytes, []
        for label, names in groups.items():
            size = len(self._payloads[label]) if label in layers else total
            total -= size
            tensors = [_decode(self[name]) for name in names]
            weights = sum(tensor.numel() for tensor in tensors)
            kept = sum(int(tensor.count_nonzero()) for tensor in tensors)
            rows.append((label, weights, kept, 8 * size / weights if weights else math.nan, size))
        table = pd.DataFrame(rows, columns=["layer", "weights", "kept", "bits per weight", "bytes"])
        return table.assign(share=table["bytes"] / self.nbytes)


def _decode(entry):
    return entry.clone() if isinstance(entry, torch.Tensor) else entry.decode()


def _identity(entry):
    """Equal for entries that need storing once only."""
    if not isinstance(entry, torch.Tensor) or not entry.numel():
        return id(entry)
    return entry.data_ptr(), entry.dtype, entry.shape, entry.stride(), entry.device
