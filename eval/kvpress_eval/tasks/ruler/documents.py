"""SQuAD 2.0 and HotpotQA as RULER reads them: questions in file order over one sorted list of distinct documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvpress.errors import InputError
from kvpress_eval.tasks.ruler.sources import GET


@dataclass(frozen=True)
class Question:
    """A question over documents, which are given by their indices.

    gold: those that hold the answer. own: those that are always tried first, gold included, in file order. near: those
    that fill up before others do. cluster: questions that share it are about the same article.
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    own: tuple[int, ...]
    near: tuple[int, ...]
    cluster: str


@dataclass(frozen=True)
class Corpus:
    questions: list[Question]
    documents: list[str]


@lru_cache(maxsize=2)
def squad(path: Path) -> Corpus:
    """Paragraphs as documents, answerable questions only; the rest of the article is near.

    Raises:
        InputError: the file has not SQuAD's fields.
    """
    return _read(path, _squad)


@lru_cache(maxsize=2)
def hotpotqa(path: Path) -> Corpus:
    """Title, newline and sentences as a document; a question's own ten are always there, the supporting ones are gold.

    Raises:
        InputError: the file has not HotpotQA's fields.
    """
    return _read(path, _hotpotqa)


def _read(path: Path, parse: Callable[[Any], Corpus]) -> Corpus:
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"'{path}' has not the expected fields ({error!r}): get it with `{GET}`") from None


def _squad(content: Any) -> Corpus:
    articles = content["data"]
    documents = sorted({paragraph["context"] for article in articles for paragraph in article["paragraphs"]})
    index = {document: number for number, document in enumerate(documents)}
    questions = []
    for article in articles:
        paragraphs = [index[paragraph["context"]] for paragraph in article["paragraphs"]]
        for paragraph, gold in zip(article["paragraphs"], paragraphs, strict=True):
            near = tuple(dict.fromkeys(number for number in paragraphs if number != gold))
            for asked in paragraph["qas"]:
                if asked["is_impossible"]:
                    continue
                answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                questions.append(Question(asked["question"], answers, (gold,), (gold,), near, article["title"]))
    return Corpus(questions, documents)


def _hotpotqa(content: Any) -> Corpus:
    def text(title: str, sentences: list[str]) -> str:
        return f"{title}\n{''.join(sentences)}"

    documents = sorted({text(title, sentences) for item in content for title, sentences in item["context"]})
    index = {document: number for number, document in enumerate(documents)}
    questions = []
    for item in content:
        supporting = {title for title, _ in item["supporting_facts"]}
        own = tuple(index[text(title, sentences)] for title, sentences in item["context"])
        gold = tuple(number for number, (title, _) in zip(own, item["context"], strict=True) if title in supporting)
        questions.append(Question(item["question"], (item["answer"],), gold, own, (), item["_id"]))
    return Corpus(questions, documents)
