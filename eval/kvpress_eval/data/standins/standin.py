"""What a stand-in is, and its rows in LongBench's schema."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvpress_eval.data.standins.sources import Sources


@dataclass(frozen=True)
class Item:
    """One question. cluster: names what it shares with others (article, file); the rest as in LongBench's rows."""

    input: str
    context: str
    answers: tuple[str, ...]
    cluster: str
    language: str = "en"
    all_classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Standin:
    """A set that is built from real text and answered under the prompt, metric and length of a LongBench set.

    like: that LongBench set. sources: names in `Sources.ORIGINS`. make: yields items without end or until its source is
    used up; the builder takes as many as it wants. in_macro: see Task. optional: whether the build goes on without it
    where its source is missing.
    """

    name: str
    like: str
    sources: tuple[str, ...]
    make: Callable[[Sources, random.Random], Iterator[Item]]
    caveat: str
    in_macro: bool = True
    optional: bool = False


def to_row(standin: Standin, item: Item, *, source_sha256: str, index: int, seed: int) -> str:
    """One line of JSON with LongBench's eight fields and no other.

    `_id` has 48 hex digits as there: 8 of the cluster (sha256 of its name), then the sha1 of source, set, index and seed.
    `length` is in words of input, context and answers.
    """
    cluster = hashlib.sha256(item.cluster.encode()).hexdigest()[:8]
    identity = hashlib.sha1(f"{source_sha256}:{standin.name}:{index}:{seed}".encode(), usedforsecurity=False)
    row = {
        "input": item.input,
        "context": item.context,
        "answers": list(item.answers),
        "length": sum(len(text.split()) for text in (item.input, item.context, *item.answers)),
        "dataset": standin.name,
        "language": item.language,
        "all_classes": None if item.all_classes is None else list(item.all_classes),
        "_id": cluster + identity.hexdigest(),
    }
    return json.dumps(row, ensure_ascii=False)


def cluster_of(row_id: str) -> str:
    """The part of an `_id` that rows of one cluster share."""
    return row_id[:8]
