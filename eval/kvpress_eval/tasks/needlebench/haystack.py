"""Haystacks that are counted and cut in cl100k tokens, as NeedleBench does whatever model is evaluated."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import tiktoken

from kvpress.errors import InputError
from kvpress_eval.data import Data
from kvpress_eval.data.packages import CL100K, SHA256

#: how cl100k_base cuts text before its merges (tiktoken_ext/openai_public.py)
_PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"


def cl100k(data: Data) -> tiktoken.Encoding:
    """The tokenizer that the benchmark counts with, from its file in the data folder: nothing is downloaded.

    Raises:
        InputError: the file is missing or not the published one.
    """
    return _encoding(data.path(CL100K, sha256=SHA256[CL100K], get="kvpress data fetch needlebench-recipe"))


@cache
def _encoding(path: Path) -> tiktoken.Encoding:
    pairs = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    return tiktoken.Encoding(f"cl100k ({path})", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={})


class Essays:
    """Texts of a jsonl file with a field "text", in the order that the original's repeats give them."""

    def __init__(self, path: Path, encoding: tiktoken.Encoding) -> None:
        self._path, self._encoding = path, encoding
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
            self._texts = [str(json.loads(line)["text"]) for line in lines if line.strip()]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"'{path}' is no list of essays ({error!r}): get the original file") from None
        self._tokens: dict[int, list[int]] = {}

    def order(self, repeat: int) -> list[int]:
        """Order of the texts in a repeat: the shuffles with seeds 0 to `repeat`, one upon the other."""
        order = list(range(len(self._texts)))
        for seed in range(repeat + 1):
            random.Random(seed).shuffle(order)
        return order

    def tokens(self, repeat: int, n: int) -> list[int]:
        """The first n tokens of a repeat's order.

        Raises:
            InputError: all texts together are shorter. (The original takes what there is and says nothing.)
        """
        taken: list[int] = []
        for index in self.order(repeat):
            if len(taken) >= n:
                break
            if index not in self._tokens:
                self._tokens[index] = self._encoding.encode_ordinary(self._texts[index])
            taken += self._tokens[index]
        if len(taken) < n:
            raise InputError(
                f"'{self._path.name}' has {len(taken):,} tokens and a haystack of {n:,} is asked for: lower the length"
            )
        return taken[:n]


def insert(tokens: list[int], pieces: Sequence[list[int]], positions: Sequence[int]) -> list[int]:
    """Put pieces in, one after the other; each position counts what was put in before it. One past the end is the end."""
    for piece, position in zip(pieces, positions, strict=True):
        tokens = tokens[:position] + piece + tokens[position:]
    return tokens
