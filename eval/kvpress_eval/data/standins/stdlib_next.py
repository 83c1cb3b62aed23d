"""Code completion: the next line of a file of Python's standard library."""

from __future__ import annotations

import io
import random
import tokenize
from collections.abc import Iterator
from functools import partial
from itertools import accumulate

from kvpress_eval.data.standins.renaming import renamed
from kvpress_eval.data.standins.sources import Sources
from kvpress_eval.data.standins.standin import Item, Standin

#: marks that make the metric pass over a line
_PASSED_OVER = ("`", "#", "//")
#: characters of the line that is asked for, without its indentation
SHORTEST, LONGEST = 15, 90
_RENAMED = "the library's code under other names, against memory of it; items depend on this Python's version"
_LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_TEXT = {tokenize.STRING, tokenize.COMMENT}
_CAVEAT = "the standard library is memorised; the items depend on this Python's version, which the manifest names"


def make(sources: Sources, rng: random.Random, *, words: int, rename: bool = False) -> Iterator[Item]:
    """Files take turns in random order, each with one line.

    words: of the code before that line, at least a quarter of them. rename: give the names that a file defines new ones.
    """
    while True:
        for path in rng.sample(list(sources.stdlib), len(sources.stdlib)):
            text = renamed(sources.stdlib[path]) if rename else sources.stdlib[path]
            lines = text.split("\n")
            before = [0, *accumulate(len(line.split()) for line in lines)]
            found = [i for i in code_lines(text) if 4 * before[i] >= words]
            if found:
                chosen = rng.choice(found)
                first = next(i for i in range(chosen) if before[chosen] - before[i] <= words)
                context = "".join(f"{line}\n" for line in lines[first:chosen])
                yield Item("", context, (lines[chosen],), path, language="python")


def code_lines(text: str) -> list[int]:
    """Indices of lines of code: no comments, no blank lines, nothing that begins in a string, nothing that the metric would
    pass over, and of a length between SHORTEST and LONGEST. None if the text is no Python of this version."""
    first: dict[int, int] = {}
    continued: set[int] = set()
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            start, end = token.start[0] - 1, token.end[0] - 1
            if token.type not in _LAYOUT:
                first.setdefault(start, token.type)
                continued.update(range(start + 1, end + 1))
    except (tokenize.TokenError, SyntaxError):
        return []
    lines = text.split("\n")
    begun = (i for i, kind in first.items() if kind not in _TEXT and i not in continued)
    begun = (i for i in begun if not any(mark in lines[i] for mark in _PASSED_OVER))
    return [i for i in begun if SHORTEST <= len(lines[i].strip()) <= LONGEST]


STANDINS = (
    Standin("standin_stdlib_next", "lcc", ("stdlib",), partial(make, words=1200), _CAVEAT),
    Standin("standin_stdlib_next_renamed", "lcc", ("stdlib",), partial(make, words=1200, rename=True), _RENAMED),
    Standin("standin_stdlib_next_400", "lcc", ("stdlib",), partial(make, words=400), _CAVEAT),
)
