"""Few-shot QA: worked examples from other articles, then a passage and a question; the passage is in the query."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

from kvpress_eval.data.standins.sources import Paragraph, Question, Sources
from kvpress_eval.data.standins.standin import Item, Standin

_CAVEAT = "the passage with the answer stands in the query, as in triviaqa: losing the context loses only the examples"


def make(sources: Sources, rng: random.Random, *, words: int) -> Iterator[Item]:
    """Articles take turns. words: of the examples."""
    articles = [[p for p in article if p.questions] for article in sources.squad]
    articles = rng.sample(articles, len(articles))
    everything = [paragraph for article in articles for paragraph in article]
    queues = [rng.sample(article, len(article)) for article in articles]
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            if turn < len(queue):
                query = queue[turn]
                question = rng.choice(query.questions)
                shown = examples(query, everything, words, rng)
                yield Item(
                    frame(query, question, answer=None), "\n".join(shown), question.answers, cluster=query.article
                )


def examples(query: Paragraph, everything: list[Paragraph], words: int, rng: random.Random) -> list[str]:
    """Examples of other articles, as many as fit."""
    shown: list[str] = []
    left, used = words, set()
    for index in rng.sample(range(len(everything)), len(everything)):
        paragraph = everything[index]
        if paragraph.article == query.article or index in used:
            continue
        question = rng.choice(paragraph.questions)
        example = frame(paragraph, question, answer=question.answers[0])
        if len(example.split()) > left:
            break
        used.add(index)
        shown.append(example)
        left -= len(example.split())
    return shown


def frame(paragraph: Paragraph, question: Question, *, answer: str | None) -> str:
    """One example, or the query if there is no answer."""
    text = f"Passage:\n{paragraph.text}\nQuestion:\n{question.text}\nAnswer:"
    return text if answer is None else f"{text}\n{answer}\n"


STANDINS = (
    Standin("standin_squad_fewshot", "triviaqa", ("squad",), partial(make, words=8000), _CAVEAT),
    Standin("standin_squad_fewshot_1k", "triviaqa", ("squad",), partial(make, words=1000), _CAVEAT),
)
