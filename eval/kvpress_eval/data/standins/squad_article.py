"""Single-document QA: a human question about a Wikipedia article, with the article as context (all of it, or 1,000 words)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

from kvpress_eval.data.standins.sources import Paragraph, Sources
from kvpress_eval.data.standins.standin import Item, Standin

#: there are 35 articles, so that 200 items are six or fewer of each
_PER_ARTICLE = 6
_CAVEAT = "Wikipedia is memorised: a model answers part of this without its context; 35 articles are 35 clusters"


def make(sources: Sources, rng: random.Random, *, words: int | None) -> Iterator[Item]:
    """Articles take turns, each with another of its questions. words: of the context; None is the whole article."""
    # drawn first: both sizes ask the same questions
    asked = []
    for article in sources.squad:
        asking = [paragraph for paragraph in article if paragraph.questions]
        golds = rng.sample(asking, min(_PER_ARTICLE, len(asking)))
        asked.append((article, [(gold, rng.choice(gold.questions)) for gold in golds]))
    rng.shuffle(asked)
    for turn in range(_PER_ARTICLE):
        for article, questions in asked:
            if turn < len(questions):
                gold, question = questions[turn]
                shown = article if words is None else around(article, article.index(gold), words, rng)
                context = "\n\n".join(paragraph.text for paragraph in shown)
                yield Item(question.text, context, question.answers, cluster=gold.article)


def around(article: list[Paragraph], index: int, words: int, rng: random.Random) -> list[Paragraph]:
    """Paragraphs in a row, the one at `index` among them, as many as do not exceed `words`, grown to either side at
    random so that the answer has no usual place."""
    first, last = index, index + 1
    n_words = len(article[index].text.split())
    open_sides = {-1, 1}
    while open_sides:
        side = rng.choice(sorted(open_sides))
        new = first - 1 if side < 0 else last
        if not 0 <= new < len(article) or n_words + len(article[new].text.split()) > words:
            open_sides.discard(side)
            continue
        n_words += len(article[new].text.split())
        first, last = min(first, new), max(last, new + 1)
    return article[first:last]


STANDINS = (
    Standin("standin_squad_article", "multifieldqa_en", ("squad",), partial(make, words=None), _CAVEAT),
    Standin("standin_squad_article_1k", "multifieldqa_en", ("squad",), partial(make, words=1000), _CAVEAT),
)
