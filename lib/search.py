"""Search over a quantizer's knob for the file that meets a budget."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np

from .codec import Compressed

FILES = 3  # after which a budget of bytes that is met well enough is left at that
SPARE = 2  # files that a search for points to lose may take beyond those of bisection
CLOSE, FAR = 0.03, 0.1  # shares of it that may be left over before, and then
AIMS = (0.0, 0.01, 0.05)  # shares that the first, second and later files aim below it
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


def most_accurate_within(
    most: float, at: Callable[[float], Compressed], knobs: Sequence[float],
    expected: Callable[[float], float],
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
        Bytes that the coded weights are expected to take for a value, before there is a file.

    Notes
    -----
    Each file is the one whose expected size is the budget. Expected sizes are set right by the
    files before: all else in a file takes what it took in them, and logarithms are off by what
    they were off at the files next to it. Three files are enough unless none of them meets the
    budget, or the best leaves a tenth of it.
    """
    low, high, best, rest = -1, len(knobs), None, 0
    sizes: dict[int, float] = {}  # logarithms of size / budget

    def raw(index: int) -> float:
        return math.log(max(expected(knobs[index]) + rest, TINY) / most)

    def excess(index: int) -> float:
        made = sorted(sizes, reverse=True)  # smallest first
        errors = [sizes[i] - raw(i) for i in made] or [0.0]
        return raw(index) + float(np.interp(raw(index), [raw(i) for i in made] or [0.0], errors))

    while high - low > 1:
        aim = AIMS[min(len(sizes), FILES - 1)]
        middle = bisect_left(range(low + 1, high - 1), aim, key=lambda i: -excess(i)) + low + 1
        candidate = at(knobs[middle])
        sizes[middle] = math.log(candidate.nbytes / most)
        rest = candidate.summary()[-1].bytes
        if sizes[middle] > 0:
            low = middle
        else:
            best, high = candidate, middle
        allowed = CLOSE if len(sizes) < FILES else FAR
        if best is not None and sizes[high] > -allowed:
            break
    return best


def smallest_within(
    most: float, lost: Callable[[Compressed], float], at: Callable[[float], Compressed],
    knobs: Sequence[float], start: float,
) -> Compressed | None:  # fmt: skip
    """The smallest file that loses at most so many points, where larger files lose less.

    From a start on in steps that double until it lies between two files, then where the logarithm
    of what is lost would meet the budget on a straight line (regula falsi); always so near the
    middle that it takes at most ``SPARE`` files more than bisection may.

    References
    ----------
    Oliveira, Takahashi: An enhancement of the bisection method average performance preserving
    minmax optimality, ACM Transactions on Mathematical Software 2020 (the projection).
    """
    low, high, best = -1, len(knobs), None
    losses: dict[int, float] = {}  # logarithms; what files lose may be zero, or less
    little = most / 4 + 0.1
    index = min(range(high), key=lambda i: abs(knobs[i] - start))
    step, left = max(1, high // 16), high.bit_length() + SPARE
    while high - low > 1:
        left -= 1
        index = min(max(index, high - 2**left, low + 1), low + 2**left, high - 1)
        candidate = at(knobs[index])
        points = lost(candidate)
        losses[index] = math.log(max(points, 0.0) + little)
        if points <= most:
            low, best = index, candidate
        else:
            high = index
        if low < 0 or high == len(knobs):
            index = high - step if low < 0 else low + step
            step *= 2
            continue
        share = (math.log(most + little) - losses[low]) / (losses[high] - losses[low])
        index = low + round(min(max(share, 0.1), 0.9) * (high - low))
    return best
