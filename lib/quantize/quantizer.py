"""What a quantizer is: how precisely to store the weights that are kept, with one knob."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..codes import Codes
from ..fields import check_fields
from ..prune import Removed
from ..repair import bias_correction


@dataclass(frozen=True)
class Quantizer:
    """From weights, and what they matter, to integer codes; derive from it to add one.

    Attributes
    ----------
    knob : str
        Name of the field that trades size against accuracy.
    settings : sequence of float
        Values of the knob that a budget is searched over, largest file first.
    trains : bool
        Whether ``store`` needs training data, ``removed.train``.
    """

    trains: ClassVar[bool] = False
    knob: ClassVar[str]
    settings: ClassVar[Sequence[float]]

    def __post_init__(self) -> None:
        """Raise ValueError for a field of another type than declared; extend it by the ranges."""
        check_fields(self)

    @property
    def value(self) -> float:
        """Where the knob stands."""
        return getattr(self, self.knob)

    def at(self, value: float) -> Self:
        """The same quantizer with its knob at another value."""
        return replace(self, **{self.knob: float(value)})

    def prepare(self, removed: Removed, images: Tensor, labels: Tensor) -> Any:
        """What ``codes`` needs besides weights, masks and the knob: it does not depend on them.

        From the network that is stored, pruned and repaired, and reference images [N, ...] with
        their int64 labels [N].
        """
        return None

    def expected(self, removed: Removed, prepared: Any, images: Tensor) -> Callable[[float], float]:
        """Bits a weight that a file is expected to take, as a function of the knob.

        Up to a factor that hardly changes: files show it. By default the knob is such a size.
        """
        return lambda value: value

    def codes(
        self, weights: dict[str, Tensor], masks: dict[str, Tensor], prepared: Any
    ) -> dict[str, Codes]:
        """Codes of all weights by name; removed weights decode to zero. Define this, or ``store``.

        The masks are bool and shaped like the weights, True = kept; the rest is from ``prepare``.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither codes nor store")

    def store(
        self, removed: Removed, prepared: Any, images: Tensor
    ) -> tuple[nn.Module, dict[str, Codes]]:
        """Quantize a network, and correct its biases for the errors made.

        Returns a copy of ``removed.network`` with decoded weights and corrected biases, and the
        codes by weight name.
        """
        weights = {name: removed.network.get_parameter(name).detach() for name in removed.masks}
        codes = self.codes(weights, removed.masks, prepared)
        network = copy.deepcopy(removed.network)
        with torch.no_grad():
            for name, code in codes.items():
                network.get_parameter(name).copy_(code.decode())
        return bias_correction(removed.network, network, images), codes
