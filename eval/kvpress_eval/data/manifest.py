"""MANIFEST.json of a data folder: for every fetched file the package, version, digests and licence it came with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from kvpress.errors import InputError
from kvpress.files import write_atomically

NAME = "MANIFEST.json"
MAX_BYTES = 10_000_000


@dataclass(frozen=True)
class Origin:
    """Where one file came from. sha256: of the file itself."""

    package: str
    version: str
    wheel_sha256: str
    sha256: str
    licence: str


def read_manifest(folder: Path) -> dict[str, Origin]:
    """Origins by file name; empty if nothing was fetched yet.

    Raises:
        InputError: the file is not one that `write_manifest` made.
    """
    path = folder / NAME
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("too large")
        return {name: Origin(**origin) for name, origin in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"'{path}' cannot be read ({error}): delete it and fetch again") from None


def write_manifest(folder: Path, origins: dict[str, Origin]) -> None:
    """Enter files into the manifest of a folder; what it says of other files stays."""
    merged = {**read_manifest(folder), **origins}
    entries = {name: asdict(merged[name]) for name in sorted(merged)}
    write_file(folder / NAME, json.dumps(entries, indent=1, ensure_ascii=False).encode(), expected=None, source=NAME)


def write_file(path: Path, content: bytes, *, expected: str | None, source: str) -> str:
    """Write a file at once or not at all, and return its sha256.

    Raises:
        InputError: the content has not the expected digest; nothing is written.
    """
    digest = hashlib.sha256(content).hexdigest()
    if expected is not None and digest != expected:
        raise InputError(
            f"{path.name} in '{source}' is not the file this package was checked with (sha256 {digest[:12]}..., expected "
            f"{expected[:12]}...): download it again"
        )
    write_atomically(path, content)
    return digest
