"""Scores by depth and length: where in the context an answer was, and whether it was still found there."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvpress_eval.records import FULL_REPEAT, Mode, Record

_PART = re.compile(r"depth (\d+(?:\.\d+)?)\Z")


@dataclass(frozen=True)
class DepthGrid:
    """Mean scores of one task, mode and arm, in points, with counts, by (length, depth in percent)."""

    family: str
    task: str
    mode: Mode
    arm: str
    scores: dict[tuple[int, float], float]
    counts: dict[tuple[int, float], int]


def depth_grids(records: Iterable[Record]) -> list[DepthGrid]:
    """One grid for each task, mode and arm whose records name depths: in parts "depth N", or one depth in `meta`."""
    found: dict[tuple[str, str, Mode, str], dict[tuple[int, float], list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for record in records:
        if record.arm == FULL_REPEAT:
            continue
        for depth, score in _by_depth(record):
            length = record.meta.get("length", record.length)
            if isinstance(length, int):
                found[record.family, record.task, record.mode, record.arm][length, depth].append(score)
    return [
        DepthGrid(
            *key,
            scores={cell: 100 * sum(values) / len(values) for cell, values in sorted(cells.items())},
            counts={cell: len(values) for cell, values in sorted(cells.items())},
        )
        for key, cells in found.items()
    ]


def _by_depth(record: Record) -> Iterator[tuple[float, float]]:
    named = [(match, score) for part, score in record.parts.items() if (match := _PART.match(part))]
    for match, score in named:
        yield float(match[1]), score
    depth = record.meta.get("depth")
    if not named and isinstance(depth, int | float):
        yield float(depth), record.score
