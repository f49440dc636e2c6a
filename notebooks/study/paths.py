"""Where things are: light to import, for commands that only look what is up to date."""

import os
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("CACHE_ROOT", ROOT / ".cache"))
LEDGER = "STUDY_LEDGER"
"""Environment variable: a file in which each path that is written is noted, a line each."""
QUIET = "STUDY_QUIET"
"""Environment variable: where it is set no progress is shown."""
STANDARD = "nncodec"
"""The standard coder's table, and what all its settings together are called: its best files."""


def results(name: str) -> Path:
    """Folder of a profile's tables, claims and models, ``RESULTS_ROOT`` or the checkout's."""
    return Path(os.environ.get("RESULTS_ROOT", ROOT / "results")) / name


def figures(name: str) -> Path:
    """Folder of a profile's figures, in ``FIGURES_ROOT`` or the checkout's."""
    return Path(os.environ.get("FIGURES_ROOT", ROOT / "figures")) / name


def check_known(what: str, name: str, known: Collection[str]) -> None:
    """Raise a ValueError that lists the known names, unless the name is one of them."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")
