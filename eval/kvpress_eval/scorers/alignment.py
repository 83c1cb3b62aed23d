"""Alignment of two sequences: the longest common subsequence, and the edit distances that follow from such tables.

Rows are computed as arrays and read back with a loop, so neither recursion depth nor Python speed limits the length.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray


def lcs_table(first: Sequence[Hashable], second: Sequence[Hashable]) -> NDArray[np.int32]:
    """Lengths of the longest common subsequences of all pairs of prefixes, [len(first) + 1, len(second) + 1]."""
    codes: dict[Hashable, int] = {}
    second_codes = np.array([codes.setdefault(item, len(codes)) for item in second], dtype=np.int64)
    table = np.zeros((len(first) + 1, len(second) + 1), dtype=np.int32)
    for row, item in enumerate(first):
        matches = second_codes == codes.get(item, -1)
        # a running maximum stands for "at least as long as the entry to the left"
        np.maximum.accumulate(np.maximum(table[row, 1:], table[row, :-1] + matches), out=table[row + 1, 1:])
    return table


def lcs_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence."""
    return int(lcs_table(first, second)[-1, -1])


def lcs_items(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """One longest common subsequence, backwards.

    Where there are several, the one that this walk from the end finds: a match goes along the diagonal, otherwise up
    if that entry is larger than the left one, else left (rouge 1.0.1, `_recon_lcs`).
    """
    table = lcs_table(first, second)
    row, column = len(first), len(second)
    items = []
    while row and column:
        if first[row - 1] == second[column - 1]:
            row, column = row - 1, column - 1
            items.append(first[row])
        elif table[row - 1, column] > table[row, column - 1]:
            row -= 1
        else:
            column -= 1
    return items


def indel_similarity(first: str, second: str) -> float:
    """1 - d / (sum of lengths), where d counts insertions and deletions; 1 for two empty strings."""
    total = len(first) + len(second)
    return 1.0 - (total - 2 * lcs_length(first, second)) / total if total else 1.0


def levenshtein(first: str, second: str) -> int:
    """Number of insertions, deletions and substitutions that make one string of the other."""
    columns = np.arange(len(second) + 1)
    second_codes = np.array([ord(character) for character in second], dtype=np.int64)
    distances = columns.copy()
    for character in first:
        substituted = distances[:-1] + (second_codes != ord(character))
        best = np.concatenate(([distances[0] + 1], np.minimum(distances[1:] + 1, substituted)))
        # the cheapest way to arrive from the left costs 1 a column
        distances = np.minimum.accumulate(best - columns) + columns
    return int(distances[-1])
