"""Passage retrieval and passage count, over numbered paragraphs of SQuAD's articles."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from kvpress_eval.data.standins.sources import Paragraph, Sources
from kvpress_eval.data.standins.standin import Item, Standin

#: as LongBench's prompt says
N_PARAGRAPHS = 30
#: paragraphs of a count item, and the fewest different ones among them
N_COUNTED, FEWEST = 20, 8


def numbered(paragraphs: Sequence[Paragraph]) -> str:
    """Paragraphs with their numbers, from 1."""
    return "\n\n".join(f"Paragraph {i}: {paragraph.text}" for i, paragraph in enumerate(paragraphs, start=1))


def make_retrieval(sources: Sources, rng: random.Random) -> Iterator[Item]:
    """Thirty paragraphs of thirty articles, and a human question about one of them. The articles take turns."""
    articles = [[p for p in article if p.questions] for article in sources.squad]
    queues = [rng.sample(article, len(article)) for article in rng.sample(articles, len(articles)) if article]
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            if turn < len(queue):
                gold = queue[turn]
                others = [article for article in articles if article and article[0].article != gold.article]
                shown = [gold, *(rng.choice(article) for article in rng.sample(others, N_PARAGRAPHS - 1))]
                rng.shuffle(shown)
                question = rng.choice(gold.questions).text
                yield Item(question, numbered(shown), (f"Paragraph {shown.index(gold) + 1}",), cluster=gold.article)


def make_count(sources: Sources, rng: random.Random) -> Iterator[Item]:
    """Some paragraphs, some of them repeated, shuffled. Every item draws its own from all articles."""
    paragraphs = [paragraph for article in sources.squad for paragraph in article]
    number = 0
    while True:
        n_different = rng.randint(FEWEST, N_COUNTED)
        different = rng.sample(paragraphs, n_different)
        shown = different + [rng.choice(different) for _ in range(N_COUNTED - n_different)]
        rng.shuffle(shown)
        yield Item("", numbered(shown), (str(n_different),), cluster=f"draw {number}")
        number += 1


STANDINS = (
    Standin(
        "standin_passage_retrieval",
        "passage_retrieval_en",
        ("squad",),
        make_retrieval,
        "the query is a question, not an abstract, and each paragraph is of another article: easier than LongBench's",
    ),
    Standin(
        "standin_passage_count",
        "passage_count",
        ("squad",),
        make_count,
        "models are near the floor here: not part of the macro average",
        in_macro=False,
    ),
)
