"""Search over a quantizer's knob for the file that meets a budget."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

from .codec import Compressed

FILES = 3  # after which a budget of bytes that is met well enough is left at that
CLOSE, FAR = 0.03, 0.1  # shares of it that may be left over before, and then
AIMS = (0.0, 0.01, 0.04)  # shares that the first, second and later files aim below it
TINY = 1e-12


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


Size = Callable[[float], float]  # expected from a knob's value, up to a factor


def most_accurate_within(
    most: float, at: Callable[[float], Compressed], knobs: Sequence[float],
    expected: Callable[[float, Compressed | None], Size], first: float,
) -> Compressed | None:  # fmt: skip
    """The largest file of at most that many bytes, or one hardly smaller.

    Parameters
    ----------
    most : float
        Bytes.
    at : callable
        The file for a value of the knob.
    knobs : sequence of float
        Values of the knob, along which sizes fall.
    expected : callable
        Expected sizes: before any file for ``(value, None)``, then from the file for that value.
    first : float
        What the size before any file should be.

    Notes
    -----
    Each file is the one of which the logarithm of the expected size, set right by the files
    before, is the budget's; the slope follows from two files. Three are enough unless none of
    them meets the budget, or the best leaves a tenth of it.
    """
    low, high, best = -1, len(knobs), None
    sizes: dict[int, float] = {}  # logarithms of size / budget
    size, place, left, slope = expected(knobs[0], None), 0.0, -math.log(first), 1.0

    def excess(index: int) -> float:
        return place + slope * (math.log(max(size(knobs[index]), TINY)) + left)

    while high - low > 1:
        aim = -AIMS[min(len(sizes), FILES - 1)]
        middle = bisect_left(range(low + 1, high - 1), -aim, key=lambda i: -excess(i)) + low + 1
        candidate = at(knobs[middle])
        sizes[middle] = place = math.log(candidate.nbytes / most)
        if place > 0:
            low = middle
        else:
            best, high = candidate, middle
        allowed = CLOSE if len(sizes) < FILES else FAR
        if best is not None and sizes[high] > -allowed:
            break
        size = expected(knobs[middle], candidate)
        now = {i: math.log(max(size(knobs[i]), TINY)) for i in sizes}
        left = -now[middle]
        other = min(sizes.keys() - {middle}, key=lambda i: abs(sizes[i]), default=middle)
        if now[other] != now[middle]:
            slope = (sizes[other] - place) / (now[other] - now[middle])
            slope = min(max(slope, 0.3), 3.0)
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
