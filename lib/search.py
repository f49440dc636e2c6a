"""Search over a quantizer's knob for the file that meets a budget."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

from .codec import Compressed

CLOSE = 0.03  # share of a budget of bytes that may be left over


@dataclass(frozen=True)
class Budget:
    """What is asked of a file: ``bits`` a weight, ``ratio`` to float32, points of ``max_drop``."""

    kind: str
    amount: float

    @classmethod
    def of(
        cls, bits: float | None, ratio: float | None, max_drop: float | None, val: object
    ) -> "Budget | None":
        """The one budget given, or None; ValueError for two of them or an unusable one."""
        given = {"bits": bits, "ratio": ratio, "max_drop": max_drop}
        found = [(name, value) for name, value in given.items() if value is not None]
        if len(found) > 1:
            raise ValueError(f"give one budget, not {' and '.join(name for name, _ in found)}")
        for name, value in found:
            if not isinstance(value, Real) or isinstance(value, bool):
                raise ValueError(f"{name} must be a number, not {value!r}")
            if not (math.isfinite(value) and (value > 0 or name == "max_drop" and value == 0)):
                raise ValueError(f"{name} must be a positive number, not {value}")
        if max_drop is not None and val is None:
            raise ValueError("max_drop is measured on validation data: give val=(images, labels)")
        return cls(*found[0]) if found else None


def most_accurate_within(
    most: float, at: Callable[[float], Compressed], knobs: Sequence[float]
) -> Compressed | None:
    """The largest file of at most that many bytes, or one hardly smaller.

    Sizes fall along the knobs: regula falsi on their logarithm, with the weights of Dowell and
    Jarratt (BIT 1971, "Illinois"), takes fewer encodings than bisection.
    """
    low, high, best, side = -1, len(knobs), None, 0
    above, below = 4.0, -4.0  # log of size / budget at low and high; guesses until measured
    while high - low > 1:
        middle = round(low + (high - low) * above / (above - below))
        middle = min(max(middle, low + 1), high - 1)
        candidate = at(knobs[middle])
        excess = math.log(candidate.nbytes / most)
        if excess > 0:
            low, above, below = middle, excess, below / 2 if side > 0 else below
        else:
            best, high, below, above = candidate, middle, excess, above / 2 if side < 0 else above
            if excess > -CLOSE:
                break
        side = 1 if excess > 0 else -1
    return best


def smallest_that(
    fits: Callable[[Compressed], bool],
    at: Callable[[float], Compressed],
    knobs: Sequence[float],
) -> Compressed | None:
    """The smallest file that fits, where larger files do too: bisection."""
    low, high, best = 0, len(knobs) - 1, None
    while low <= high:
        middle = (low + high) // 2
        candidate = at(knobs[middle])
        if fits(candidate):
            best, low = candidate, middle + 1
        else:
            high = middle - 1
    return best
