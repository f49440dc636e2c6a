"""Files written whole or not at all."""

import contextlib
import os
import secrets
from pathlib import Path


def write_bytes(path: Path, data: bytes) -> None:
    """Write under another name and rename: on any error an older file stays as it was.

    The folder must exist. OSError as the system raises it, for a full disk say; nothing
    half-written stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno:  # a full disk does not say whose
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
