"""Progress: one bar in a browser or a terminal, and none where nobody watches."""

import os

from tqdm.auto import tqdm

from .paths import QUIET


def bar(*arguments, disable: bool = False, **named) -> tqdm:
    """A ``tqdm`` bar: a widget in a notebook, a line on stderr elsewhere.

    There is none where ``QUIET`` is set, as where a notebook's outputs are stored or compared: a
    bar would be one of them, and another each time.
    """
    return tqdm(*arguments, disable=disable or QUIET in os.environ, **named)
