"""Operations in place: carried out elsewhere, since layers keep what they put out, and followed.

What a tensor holds after a change stands in another tensor. Whoever reads it later, by the same
name, through a view, or as the tensor that it is a view of, gets that.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..inputs import memory

Geometry = tuple[tuple[int, ...], tuple[int, ...], int]  # sizes, strides and offset in a storage


@dataclass(eq=False)
class Written:
    """What was written, elsewhere, into a storage that still holds what was there before.

    Attributes
    ----------
    storage : StorageWeakRef
        While it is held, no other storage has this one's identity.
    place : tuple
        Where a result belongs.
    result : Tensor
        What is there now.
    whole : Tensor or None
        All that the storage would hold, once somebody reads another part of it.
    """

    storage: StorageWeakRef
    place: Geometry
    result: Tensor
    whole: Tensor | None = None

    def held(self, tensor: Tensor) -> Tensor:
        """What a tensor in this storage holds now."""
        place = _geometry(tensor)
        if self.whole is None and place == self.place:
            return self.result
        with torch.enable_grad():
            if self.whole is None:
                base = tensor if tensor._base is None else tensor._base
                size = base.untyped_storage().nbytes() // base.element_size()
                self.whole = base.as_strided((size,), (1,), 0).clone()
                self.whole.as_strided(*self.place).copy_(self.result)
            return self.whole.as_strided(*place)


class Changes:
    """All changes in place of one forward pass.

    Parameters
    ----------
    made : callable
        Told each tensor that is made here.
    refuse : callable
        ``(what, advice) -> the error`` for what cannot be followed.
    """

    def __init__(
        self, made: Callable[[Tensor], Any], refuse: Callable[[str, str], Exception]
    ) -> None:
        self.made, self.refuse = made, refuse
        self.written: dict[int | None, Written] = {}  # by memory

    def note(self, target: Tensor, result: Tensor) -> None:
        """A function changes ``target`` in place; what it holds now is ``result``."""
        if memory(result) == memory(target):
            if _geometry(result) != _geometry(target):
                raise self.refuse(
                    "a change of shape in place",
                    "write x = x.unsqueeze(0), x.transpose(0, 1), ... for x.unsqueeze_(0), ...",
                )
            return  # nothing changed
        for key, old in list(self.written.items()):
            if old.storage.expired():  # nobody can read it any more
                del self.written[key]
        storage = StorageWeakRef(target.untyped_storage())
        self.written[memory(target)] = Written(storage, _geometry(target), result)

    def current(self, tree: Any) -> Any:
        """The same tree with what its tensors hold now."""
        if not self.written:
            return tree
        if isinstance(tree, Tensor):
            while entry := self.written.get(memory(tree)):
                part = _geometry(tree) != entry.place
                if part and (hasattr(tree, "factor") or hasattr(entry.result, "factor")):
                    raise self.refuse(
                        "a factor of which a part is changed in place",
                        "make a new tensor of it: gate = gate * c, or torch.cat",
                    )
                tree = entry.held(tree)
                self.made(tree)
            return tree
        if isinstance(tree, (tuple, list)):
            branches = [self.current(branch) for branch in tree]
            if all(new is old for new, old in zip(branches, tree, strict=True)):
                return tree
            named = hasattr(tree, "_fields")
            return type(tree)(*branches) if named else type(tree)(branches)
        if isinstance(tree, dict):
            new = {key: self.current(branch) for key, branch in tree.items()}
            return new if any(new[key] is not tree[key] for key in new) else tree
        return tree


def _geometry(tensor: Tensor) -> Geometry:
    return tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())


def is_inplace(func: Any) -> bool:
    """Whether a function changes its first argument, by the way it is spelt."""
    spelt = getattr(func, "__name__", "")
    return spelt in FRESH or (spelt.endswith("_") and not spelt.startswith("__"))


def out_of_place(
    func: Any, name: str, args: tuple, kwargs: dict
) -> tuple[Any, tuple, dict, Tensor | None]:
    """The variant of a function that leaves its arguments as they are; what it would change."""
    spelt, target = getattr(func, "__name__", ""), None
    kwargs = dict(kwargs)
    if spelt in FRESH:
        return FRESH[spelt], args, kwargs, args[0]
    if is_inplace(func):
        func, target = getattr(torch, name, None) or getattr(F, name, func), args[0]
    if any(a is True for a in args) and (position := _inplace(func)) < len(args):
        kwargs["inplace"] = args[position]
        args = (*args[:position], False, *args[position + 1 :])
    if kwargs.pop("inplace", False):
        target = args[0] if args else kwargs["input"]
    return func, args, kwargs, kwargs.pop("out", target)


def _inplace(func: Callable) -> int:
    """Position of the argument ``inplace``, past all where there is none."""
    try:
        return list(inspect.signature(func).parameters).index("inplace")
    except (ValueError, TypeError):  # not there, or a function without a signature
        return 1 << 30


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(target.dtype).expand_as(target).clone()


def _set(target: Tensor, index: Any, value: Any) -> Tensor:
    held = target.clone()
    held[index] = value
    return held


FRESH: dict[str, Callable] = {"__setitem__": _set, "copy_": _copy, "zero_": torch.zeros_like}
