"""What a forward pass keeps for the way back, which has to be there unchanged."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..inputs import UnsupportedLayerError, memory

Place = tuple[int, int, torch.Size, tuple[int, ...], torch.dtype]  # of a tensor in memory


class Saved(saved_tensors_hooks):
    """Keeps the values of all that a pass inside of it saves, to compare them afterwards.

    Autograd tells changes in place that torch counts; those by ``.data`` or numpy it does not see,
    and would compute with what is there in the end.
    """

    def __init__(self) -> None:
        self.found: dict[Place, tuple[Tensor, Tensor]] = {}  # what is saved, and its value then
        self.changed: Tensor | None = None
        super().__init__(self._pack, lambda t: t)

    def _pack(self, saved: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # steps of torch's own may be in the middle of a pass
            saved = saved.detach()  # else a result that its own step saves would be held for ever
            if saved.layout == torch.strided and saved.numel():
                place = (
                    saved.data_ptr(), saved._version, saved.shape, saved.stride(), saved.dtype
                )  # fmt: skip
                if place in self.found:
                    self._compare(*self.found[place])
                else:
                    self.found[place] = saved, saved.clone()
        return saved

    def _compare(self, now: Tensor, before: Tensor) -> None:
        if self.changed is None and not torch.equal(_bytes(now), _bytes(before)):
            self.changed = now

    def check(self, names: Mapping[int | None, str]) -> None:
        """Raise UnsupportedLayerError where something saved is no longer what it was.

        ``names`` are those of what the model holds, by ``inputs.memory``.
        """
        found, self.found = self.found, {}  # its hooks hold on to this object
        for place, (now, before) in found.items():
            if now._version == place[1]:  # else torch tells itself, if it matters
                self._compare(now, before)
        if self.changed is None:
            return
        name = names.get(memory(self.changed))
        what = repr(name) if name else f"a tensor {list(self.changed.shape)}"
        raise UnsupportedLayerError(
            f"{what} changes during the forward pass after it was used, where torch's functions do "
            "not see it (by .data, numpy or code of another kind): compute the new value as a "
            "tensor of its own"
        )


def _bytes(t: Tensor) -> Tensor:
    return (
        t.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)
    )  # in which NaN equals itself
