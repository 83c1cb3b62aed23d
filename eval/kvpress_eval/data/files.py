"""Finding a benchmark's file and checking that it is the right one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvpress.errors import InputError


def data_folder() -> Path:
    """Where `kvpress data` puts files: $KVPRESS_DATA, or ~/.cache/kvpress/data."""
    return Path(os.environ.get("KVPRESS_DATA") or Path.home() / ".cache" / "kvpress" / "data").expanduser()


@dataclass
class Data:
    """The folders in which files are looked for, first one first; `data_folder()` is always the last.

    used: sha256 of every file that was read, by name, for the run's manifest.
    """

    folders: Sequence[Path] = ()
    used: dict[str, str] = field(default_factory=dict)

    def path(self, name: str, *, sha256: str | None = None, get: str) -> Path:
        """Path of a file.

        Args:
            name: relative path such as "ruler/squad.json".
            sha256: of the right content; None accepts any, and the manifest says which it was.
            get: what to do if it is missing, for example "kvpress data fetch ruler".

        Raises:
            InputError: it is in no folder, or its content is not the expected one.
        """
        _, found = self._find([name], get)
        digest = file_sha256(found)
        if sha256 is not None and digest != sha256:
            raise InputError(
                f"'{found}' is not the file this task was checked with (sha256 {digest[:12]}..., expected {sha256[:12]}...): "
                f"get the right one with `{get}`"
            )
        self.used[name] = digest
        return found

    def first(self, names: Sequence[str], *, get: str) -> Path:
        """Path of the first of several names that is there, with any content: all names in one folder, then in the next.

        Raises:
            InputError: none of them is in any folder; the sentence names the first.
        """
        name, found = self._find(names, get)
        self.used[name] = file_sha256(found)
        return found

    def _find(self, names: Sequence[str], get: str) -> tuple[str, Path]:
        places = [*map(Path, self.folders), data_folder()]
        for place in places:
            for name in names:
                if (place / name).is_file():
                    return name, place / name
        looked = ", ".join(f"'{place}'" for place in places)
        raise InputError(f"{names[0]} is missing (looked in {looked}): get it with `{get}`")


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
