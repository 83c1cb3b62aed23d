"""Haystacks of `needlebench-recipe`: a stretch of RULER's essays, cut in the evaluated model's own tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kvpress.errors import InputError
from kvpress_eval.data import Data
from kvpress_eval.data.packages import SHA256

ESSAYS = "ruler/PaulGrahamEssays.json"


class Essays:
    """One long text, and the places in it where a sentence begins."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.starts = [match.end() for match in re.finditer(r"[.!?]\s+(?=[A-Z])", text)] or [0]

    @staticmethod
    def load(data: Data) -> Essays:
        """The essays of RULER's haystack.

        Raises:
            InputError: the file is missing or not the published one.
        """
        return _read(data.path(ESSAYS, sha256=SHA256[ESSAYS], get="kvpress data fetch ruler"))

    def stretch(self, start: int, n_chars: int) -> str:
        """So many characters from a start on, going on at the beginning behind the end; at most the whole text."""
        text = self.text[start : start + n_chars]
        return text + self.text[: min(n_chars, len(self.text)) - len(text)]


@cache
def _read(path: Path) -> Essays:
    return Essays(json.loads(path.read_text(encoding="utf-8"))["text"])


class Haystack:
    """Text from a start on, cut to a number of tokens, into which pieces can be put at depths."""

    def __init__(self, essays: Essays, start: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self._essays, self._start, self._tokenizer = essays, start, tokenizer
        self._text = ""
        self._spans: list[tuple[int, int]] = []

    def _read(self, n: int) -> None:
        """Have at least n tokens at hand."""
        n_chars = 6 * n
        while len(self._spans) < n:
            if len(self._text) == len(self._essays.text):
                raise InputError(
                    f"the essays have {len(self._spans):,} tokens and a haystack of {n:,} is asked for: lower the length"
                )
            self._text = self._essays.stretch(self._start, n_chars)
            encoded = self._tokenizer(self._text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            self._spans = [(start, end) for start, end in encoded["offset_mapping"]]
            n_chars *= 2

    def hide(self, n: int, pieces: Sequence[str], depths: Sequence[float]) -> str:
        """The first n tokens with pieces in them; depths in percent, in rising order."""
        self._read(n)
        borders = [*(start for start, _ in self._spans[:n]), self._spans[n - 1][1]]
        text = self._text[: borders[-1]]
        parts, done = [], 0
        for piece, depth in zip(pieces, depths, strict=True):
            place = borders[int(n * (depth / 100))]
            while 0 < place < len(text) and not text[place].isspace():
                place += 1
            parts += [text[done:place], f"\n{piece}\n"]
            done = place
        return "".join([*parts, text[done:]])
