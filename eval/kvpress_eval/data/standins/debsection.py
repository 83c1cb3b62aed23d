"""Few-shot classification: the section of a Debian package, from its one-line description."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from functools import partial

from kvpress_eval.data.standins.sources import Sources
from kvpress_eval.data.standins.standin import Item, Standin

#: descriptions that a section must have to be a class
FEWEST = 60
_CAVEAT = (
    "labels are sections of the Debian archive, some of them ambiguous; the index is the one of the day of the build"
)


def make(sources: Sources, rng: random.Random, *, words: int) -> Iterator[Item]:
    """Classes take turns. words: of the examples, which are spread over the classes."""
    by_class = classes(sources.apt)
    names = sorted(by_class)
    unused = {name: rng.sample(by_class[name], len(by_class[name])) for name in names}
    while all(unused.values()):
        for name in rng.sample(names, len(names)):
            query = unused[name].pop()
            examples: list[str] = []
            while sum(len(example.split()) for example in examples) < words:
                for other in rng.sample(names, len(names)):
                    # two of a class, so that one of them is not the query
                    first, second = rng.sample(by_class[other], 2)
                    examples.append(f"Description: {second if first == query else first}\nSection: {other}")
            context = "\n".join(_first(examples, words))
            yield Item(f"Description: {query}\nSection:", context, (name,), query, all_classes=tuple(names))


def classes(index: list[tuple[str, str, str]]) -> dict[str, list[str]]:
    """Descriptions by section; each description under one section only, and no section whose name is part of another's:
    the metric looks for names anywhere in the answer."""
    sections: dict[str, set[str]] = defaultdict(set)
    for _, text, section in index:
        sections[text].add(section)
    found: dict[str, list[str]] = defaultdict(list)
    for text, names in sorted(sections.items()):
        if len(names) == 1:
            found[next(iter(names))].append(text)
    large = {name: texts for name, texts in found.items() if len(texts) >= FEWEST}
    return {name: texts for name, texts in large.items() if not any(name != other and name in other for other in large)}


def _first(examples: list[str], words: int) -> list[str]:
    shown = []
    for example in examples:
        words -= len(example.split())
        if words < 0:
            break
        shown.append(example)
    return shown


STANDINS = (
    Standin("standin_debsection", "trec", ("apt",), partial(make, words=4000), _CAVEAT, optional=True),
    Standin("standin_debsection_1k", "trec", ("apt",), partial(make, words=1000), _CAVEAT, optional=True),
)
