"""The noise floor of a whole family, where single tasks are too small to show one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from kvpress_eval.records import Mode
from kvpress_eval.report.rows import NoiseRow


@dataclass(frozen=True)
class NoiseTotal:
    """Sums over the tasks of a family, length and mode; delta and mean_abs are means over tasks, in points."""

    family: str
    length: int | None
    mode: Mode
    n_tasks: int
    n: int
    other_text: int
    changed: int
    flips: int
    delta: float
    mean_abs: float


def noise_totals(rows: Sequence[NoiseRow]) -> list[NoiseTotal]:
    def key(row: NoiseRow) -> tuple[str, int, Mode]:
        return row.family, row.length or 0, row.mode

    totals = []
    for _, found in groupby(sorted(rows, key=key), key):
        group = list(found)
        totals.append(
            NoiseTotal(
                family=group[0].family,
                length=group[0].length,
                mode=group[0].mode,
                n_tasks=len(group),
                n=sum(row.n for row in group),
                other_text=sum(row.other_text for row in group),
                changed=sum(row.changed for row in group),
                flips=sum(row.flips for row in group),
                delta=sum(row.delta for row in group) / len(group),
                mean_abs=sum(row.mean_abs for row in group) / len(group),
            )
        )
    return totals
