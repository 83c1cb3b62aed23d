"""Small files: settings that are read with care, and results that are written at once or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from kvpress.errors import InputError

#: a file of settings is a page of text; anything larger is a mistake or an attack
MAX_BYTES = 256 * 1024


def read_yaml(path: Path, what: str) -> Any:
    """What a small YAML file of settings holds. what: how to call the file in an error.

    Raises:
        InputError: the file is missing, too large, or no YAML.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{what} '{path}' is over {MAX_BYTES // 1024} KiB")
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} '{path}' cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # a date that is none is a ValueError
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise InputError(f"{what} '{path}' is no valid YAML{where}") from None


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
