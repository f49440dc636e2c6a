"""Where values come from that carry no relevance: the images, or nothing but constants."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..inputs import memory, tensors


class Origins:
    """Memory that one forward pass fills from the images alone, or from constants alone.

    Parameters
    ----------
    fixed : set of int
        ``inputs.memory`` of what the model holds and nobody scores: buffers, parameters of norms.
    """

    def __init__(self, fixed: set[int | None]) -> None:
        self.fixed = fixed
        # while a reference is held, no other memory has that identity
        self.pixels: dict[int, StorageWeakRef] = {}
        self.constants: dict[int, StorageWeakRef] = {}

    def read(self, images: Tensor) -> None:
        """The pass begins with these."""
        self.pixels |= _identities([images])

    def raw(self, tensor: Tensor) -> bool:
        """Whether it comes from the images, and no layer has read them yet."""
        return memory(tensor) in self.pixels

    def constant(self, tensor: Tensor) -> bool:
        """Whether no image and no scored weight has a part in it."""
        place = memory(tensor)
        if place is None or place in self.pixels or tensor.requires_grad:
            return False
        return place in self.constants or place in self.fixed

    def note(self, given: Any, results: Any) -> None:
        """A function that is no layer makes results, or changes them, from what it is given."""
        read = list(tensors(given))
        if any(t.requires_grad and not self.raw(t) for t in read):
            return
        if any(self.raw(t) for t in read):
            self.pixels |= _identities(tensors(results))
        elif all(self.constant(t) for t in read):
            self.constants |= _identities(tensors(results))


def _identities(found: Iterable[Tensor]) -> dict[int, StorageWeakRef]:
    at = ((memory(t), t) for t in found)
    return {place: StorageWeakRef(t.untyped_storage()) for place, t in at if place is not None}
