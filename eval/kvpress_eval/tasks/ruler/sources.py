"""RULER's texts: word lists, essays and their sentences."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import defaultdict
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from kvpress.errors import InputError
from kvpress_eval.data import Data
from kvpress_eval.data.packages import SHA256

if TYPE_CHECKING:
    from nltk.tokenize.punkt import PunktSentenceTokenizer

GET = "kvpress data fetch ruler"


def source(data: Data, name: str) -> Path:
    """Path of one of RULER's files, checked by its sha256.

    Raises:
        InputError: it is missing or another one.
    """
    return data.path(name, sha256=SHA256[name], get=GET)


def words(data: Data, kind: str) -> tuple[str, ...]:
    """A word list of wonderwords: "noun", "adjective" or "verb"."""
    return _lines(source(data, f"ruler/{kind}list.txt"))


@lru_cache(maxsize=8)
def _lines(path: Path) -> tuple[str, ...]:
    return tuple(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines())


class Essays:
    """The essay haystack: its first n words, cut into sentences as nltk does it.

    Words are counted on the text with single spaces; after the last essay the first begins again.
    """

    def __init__(self, data: Data) -> None:
        self._essays = source(data, "ruler/PaulGrahamEssays.json")
        folder = "ruler/punkt_tab/english"
        names = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")
        self._punkt = tuple(source(data, f"{folder}/{name}") for name in names)

    def sentences(self, n_words: int) -> list[str]:
        """Sentences of the first n_words words; the last one may be cut short.

        All sentences but the last few are those of any longer beginning, so one long beginning is read and kept.
        """
        at_least = 1 << max(n_words, 4096).bit_length()
        text, spans, word_ends = _sentence_spans(self._essays, self._punkt, at_least)
        end = word_ends[n_words - 1]
        # what nltk makes of the last words depends on whether anything follows them
        settled = max(bisect_right(spans, end, key=lambda span: span[1]) - 2, 0)
        tail = _punkt_tokenizer(self._punkt).tokenize(text[spans[settled][0] : end])
        return [*(text[start:stop] for start, stop in spans[:settled]), *tail]


@lru_cache(maxsize=2)
def _essay_words(path: Path) -> list[str]:
    try:
        text = json.loads(path.read_text(encoding="utf-8"))["text"]
        found = re.sub(r"\s+", " ", text).strip().split(" ")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"'{path}' is no essay file ({error}): get it with `{GET}`") from None
    return found


@lru_cache(maxsize=4)
def _sentence_spans(
    essays: Path, punkt: tuple[Path, ...], n_words: int
) -> tuple[str, list[tuple[int, int]], list[int]]:
    """The text of the first n_words words, the character spans of its sentences, and where each word ends."""
    haystack = _essay_words(essays)
    found = (haystack * -(-n_words // len(haystack)))[:n_words]
    text = " ".join(found)
    word_ends = [end - 1 for end in accumulate(len(word) + 1 for word in found)]
    return text, list(_punkt_tokenizer(punkt).span_tokenize(text)), word_ends


@lru_cache(maxsize=2)
def _punkt_tokenizer(files: tuple[Path, ...]) -> PunktSentenceTokenizer:
    """nltk's English sentence tokenizer; read here because nltk opens only files below its own, process-wide folders."""
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    abbreviations, collocations, orthography, starters = (
        file.read_text(encoding="utf-8").splitlines() for file in files
    )
    parameters = PunktParameters()
    parameters.abbrev_types = set(abbreviations)
    parameters.collocations = {tuple(line.split("\t")) for line in collocations}
    parameters.sent_starters = set(starters)
    parameters.ortho_context = defaultdict(int)
    for line in orthography:
        word, flags = line.split("\t")
        parameters.ortho_context[word] = int(flags)
    return PunktSentenceTokenizer(parameters)
