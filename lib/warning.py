"""Warnings that point at the user's own line, however deep in this package they arise."""

import sys
import warnings
from types import FrameType
from typing import cast

PACKAGE = __name__.rpartition(".")[0]
PASSED = (PACKAGE.partition(".")[0], "torch")  # torch's decorators lie between the two


def warn(message: str) -> None:
    """A UserWarning at the line outside of this package by which it was called."""
    level, frame = 1, cast(FrameType | None, sys._getframe())
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in PASSED:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
