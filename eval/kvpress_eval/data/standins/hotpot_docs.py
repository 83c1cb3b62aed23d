"""Multi-document QA: a HotpotQA question, its own paragraphs, and random others up to a number of words."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

from kvpress_eval.data.standins.sources import MultiHop, Sources
from kvpress_eval.data.standins.standin import Item, Standin

_CAVEAT = "same source as LongBench's hotpotqa, but other items and other distractors; no yes/no questions; Wikipedia is memorised"


def make(sources: Sources, rng: random.Random, *, words: int) -> Iterator[Item]:
    """The needed paragraphs are always there, the others as long as they fit into `words`."""
    order = rng.sample(sources.hotpotqa, len(sources.hotpotqa))  # drawn first: every size asks the same questions
    everything = sorted({paragraph for row in sources.hotpotqa for paragraph in row.paragraphs})
    for row in order:
        if answerable(row):
            shown = fill(row, everything, words, rng)
            rng.shuffle(shown)
            passages = (f"Passage {i}:\n{title}\n{text}" for i, (title, text) in enumerate(shown, start=1))
            yield Item(row.question, "\n\n".join(passages), (row.answer,), cluster=row.id)


def answerable(row: MultiHop) -> bool:
    """Whether the answer is a span of a paragraph that is needed; "yes" and "no" are not."""
    if row.answer in ("yes", "no"):
        return False
    return any(row.answer in text for title, text in row.paragraphs if title in row.gold)


def fill(row: MultiHop, everything: list[tuple[str, str]], words: int, rng: random.Random) -> list[tuple[str, str]]:
    """Gold paragraphs, then the question's own distractors, then random paragraphs under other titles."""
    shown = [paragraph for paragraph in row.paragraphs if paragraph[0] in row.gold]
    left = words - sum(_words(paragraph) for paragraph in shown)
    own = [paragraph for paragraph in row.paragraphs if paragraph[0] not in row.gold]
    for paragraph in rng.sample(own, len(own)):
        if _words(paragraph) <= left:
            shown.append(paragraph)
            left -= _words(paragraph)
    titles = {title for title, _ in row.paragraphs}
    misses = 0  # in a row
    while misses < 20:
        paragraph = rng.choice(everything)
        if paragraph[0] in titles or _words(paragraph) > left:
            misses += 1
            continue
        misses = 0
        titles.add(paragraph[0])
        shown.append(paragraph)
        left -= _words(paragraph)
    return shown


def _words(paragraph: tuple[str, str]) -> int:
    return 2 + sum(len(part.split()) for part in paragraph)  # "Passage i:" are two


STANDINS = tuple(
    Standin(f"standin_hotpot_docs_{size}k", "hotpotqa", ("hotpotqa",), partial(make, words=1000 * size), _CAVEAT)
    for size in (1, 4, 9, 16)
)
