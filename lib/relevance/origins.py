"""Where values come from that carry no relevance: the images, or nothing but constants."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..inputs import tensors


class Origins:
    """Memory that one forward pass fills from the images alone, or from constants alone.

    Parameters
    ----------
    fixed : set of int
        Addresses of what the model holds and nobody scores: buffers, parameters of norms.
    """

    def __init__(self, fixed: set[int]) -> None:
        self.fixed = fixed
        # while a reference is held, no other memory has that identity
        self.pixels: dict[int, StorageWeakRef] = {}
        self.constants: dict[int, StorageWeakRef] = {}

    def read(self, images: Tensor) -> None:
        """The pass begins with these."""
        self.pixels |= _identities([images])

    def raw(self, tensor: Tensor) -> bool:
        """Whether it comes from the images, and no layer has read them yet."""
        return tensor.layout == torch.strided and _identity(tensor) in self.pixels

    def constant(self, tensor: Tensor) -> bool:
        """Whether no image and no scored weight has a part in it."""
        if tensor.layout != torch.strided or self.raw(tensor) or tensor.requires_grad:
            return False
        held = tensor.untyped_storage().data_ptr() in self.fixed
        return held or _identity(tensor) in self.constants

    def note(self, given: Any, results: Any) -> None:
        """A function that is no layer makes results, or changes them, from what it is given."""
        read = list(tensors(given))
        if any(t.requires_grad and not self.raw(t) for t in read):
            return
        if any(self.raw(t) for t in read):
            self.pixels |= _identities(tensors(results))
        elif all(self.constant(t) for t in read):
            self.constants |= _identities(tensors(results))


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _identities(found: Iterable[Tensor]) -> dict[int, StorageWeakRef]:
    strided = (t for t in found if t.layout == torch.strided)
    return {_identity(t): StorageWeakRef(t.untyped_storage()) for t in strided}
