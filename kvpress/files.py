"""Writing a file at once or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from kvpress.errors import InputError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one step, so that a reader sees the old one or the new one; its folder is made if need be.

    Raises:
        InputError: the place cannot be written; nothing is left behind.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise InputError(
            f"cannot write '{path}': {error.strerror or error}; name another place, or free some space"
        ) from None
    finally:
        if temporary is not None:
            os.unlink(temporary)
