"""One line on stderr: which layer is being coded, and the time left."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

V = TypeVar("V")


class Progress:
    """Files coded so far, and the layers of the one under way."""

    def __init__(self) -> None:
        self.files, self.width, self.began = 0, 0, 0.0
        self.sizes: dict[str, int] = {}
        self.seen: set[str] = set()

    def begin(self, sizes: Mapping[str, int]) -> None:
        """Another file is coded, of layers with so many weights."""
        self.files += 1
        self.sizes, self.seen, self.began = dict(sizes), set(), time.monotonic()
        self.write()

    def done(self, name: str) -> None:
        """A layer is coded; time left is taken as proportional to weights."""
        self.seen.add(name)
        self.write()

    def write(self) -> None:
        """Over what stands in the line."""
        finished = sum(size for name, size in self.sizes.items() if name in self.seen)
        left = ""
        if finished:
            seconds = (time.monotonic() - self.began) * (sum(self.sizes.values()) / finished - 1)
            left = f", {seconds:.0f} s left"
        line = f"file {self.files}: {len(self.seen)} of {len(self.sizes)} layers{left}"
        sys.stderr.write(f"\r{line:<{self.width}}")
        sys.stderr.flush()
        self.width = len(line)


_shown: ContextVar[Progress | None] = ContextVar("shown", default=None)


@contextmanager
def showing(wanted: bool) -> Iterator[None]:
    """Show progress within, if that is wanted."""
    token = _shown.set(Progress() if wanted else None)
    try:
        yield
    finally:
        if (progress := _shown.get()) and progress.files:
            sys.stderr.write("\n")
        _shown.reset(token)


def begin(sizes: Mapping[str, int]) -> None:
    """Tell of another file, with so many weights in each layer."""
    if progress := _shown.get():
        progress.begin(sizes)


def done(name: str) -> None:
    """Tell that a layer is coded."""
    if progress := _shown.get():
        progress.done(name)


def each(items: Iterable[tuple[str, V]]) -> Iterator[tuple[str, V]]:
    """The same items; each but the one under way is told of as coded."""
    for name, value in items:
        yield name, value
        done(name)
