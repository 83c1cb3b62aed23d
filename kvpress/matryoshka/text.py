"""Calibration text: documents of named sources, split once and for all into what trains, what chooses ranks and what judges.

A document belongs to a split by the digest of its text, so the split is the same on every machine, whatever else a folder holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kvpress.errors import InputError

#: of a document; longer files are no text that somebody wrote
MAX_DOCUMENT_BYTES = 20_000_000
#: where a number of windows is enough, a document gives at most one in so many of them
DOCUMENT_SHARE = 32
Split = Literal["train", "ranks", "judge"]
#: shares of the documents
SPLITS: dict[Split, float] = {"train": 0.9, "ranks": 0.05, "judge": 0.05}


class _Source(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    licence: str


class Folder(_Source):
    """Text files below a folder. pattern: which ones, as in `Path.glob`."""

    folder: str
    pattern: str = "**/*.txt"

    def documents(self) -> Iterator[str]:
        root = Path(self.folder).expanduser()
        if not root.is_dir():
            raise InputError(f"calibration text: there is no folder '{self.folder}'")
        try:
            paths = sorted(path for path in root.glob(self.pattern) if path.is_file())
            if not paths:
                raise InputError(f"calibration text: '{self.folder}' holds no file that matches '{self.pattern}'")
            for path in paths:
                if path.stat().st_size <= MAX_DOCUMENT_BYTES:
                    yield path.read_text(encoding="utf-8", errors="replace")
        except (OSError, NotImplementedError, ValueError) as error:
            raise InputError(
                f"calibration text: '{self.folder}' with pattern '{self.pattern}' cannot be read ({error})"
            ) from None


class Python(_Source):
    """The language reference that every Python carries for its `help()`: a small text that needs no network."""

    python: Literal["topics"]

    def documents(self) -> Iterator[str]:
        from pydoc_data import topics

        yield from (text for _, text in sorted(topics.topics.items()))


class Hub(_Source):
    """A text data set of the hub. config, split: as `datasets.load_dataset` takes them; column: of the text."""

    hub: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    limit: int = Field(default=10_000, ge=1)

    def documents(self) -> Iterator[str]:
        try:
            from datasets import load_dataset
        except ImportError:
            raise InputError("a data set of the hub needs the package datasets: pip install datasets") from None
        try:
            rows = load_dataset(self.hub, self.config, split=self.split, streaming=True)
            for index, row in enumerate(rows):
                if index == self.limit:
                    return
                yield str(row[self.column])
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"calibration text: data set '{self.hub}' cannot be read ({error})") from None


Source = Annotated[Folder | Python | Hub, Field(union_mode="left_to_right")]


def split_of(document: str) -> Split:
    """The split of a document, by its digest."""
    place = int.from_bytes(_sha256(document)[:8], "big") / 2**64
    for split, share in SPLITS.items():
        place -= share
        if place < 0:
            return split
    return "judge"


class Text:
    """Windows of token ids out of the documents of one split.

    Every window begins with the tokenizer's BOS, where it uses one, and lies within one document. limit: windows that are enough; documents
    are then taken in the order of their digests, and none gives more than a DOCUMENT_SHARE of the limit while there
    are others. ids: [m, window]; documents: of each window, the number of its document. digest: sha256 over the documents.

    Raises:
        InputError: a source cannot be read, or no document of the split is long enough for one window.
    """

    def __init__(
        self, sources: Sequence[Any], split: Split, tokenizer: Any, window: int, limit: int | None = None
    ) -> None:
        bos = [tokenizer.bos_token_id] if _uses_bos(tokenizer) else []
        size = window - len(bos)
        documents = {_sha256(one): one for source in sources for one in source.documents() if split_of(one) == split}
        each = None if limit is None else -(-limit // DOCUMENT_SHARE)
        found, more = list[tuple[int, list[int]]](), list[tuple[int, list[int]]]()
        digest = hashlib.sha256()
        for number, (key, document) in enumerate(sorted(documents.items())):
            if limit is not None and len(found) >= limit:
                break
            digest.update(key)
            if limit is not None:  # the rest would be read for nothing; a token has hardly ever more characters
                document = document[: limit * window * 16]
            ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
            made = [(number, bos + ids[at : at + size]) for at in range(0, len(ids) - size + 1, size)]
            found += made[:each]
            more += made[each:] if each is not None else []
        if limit is not None:  # few documents give more each
            found += more[: max(0, limit - len(found))]
        if not found:
            raise InputError(
                f"calibration text: no document of split '{split}' has {window:,} tokens: give longer texts, or a smaller window"
            )
        self.ids = torch.tensor([window for _, window in found[:limit]])
        self.documents = [number for number, _ in found[:limit]]
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def shuffled(self, seed: int) -> Iterator[Tensor]:
        """Windows [n] without end: every one once in an order of its own, then all again in another."""
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            for index in torch.randperm(len(self.ids), generator=generator).tolist():
                yield self.ids[index]
            epoch += 1

    def some(self, n: int, seed: int = 0) -> Tensor:
        """At most n windows [m, window], drawn without repetition."""
        generator = torch.Generator().manual_seed(seed)
        return self.ids[torch.randperm(len(self.ids), generator=generator)[:n].sort().values]


def _sha256(document: str) -> bytes:
    return hashlib.sha256(document.encode(errors="replace")).digest()


def _uses_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
