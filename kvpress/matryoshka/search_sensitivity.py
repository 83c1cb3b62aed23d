"""A fast search: score every entry at every rank once, all others full, and spend the bytes as if damages added up.

One table of entries x levels passes serves all budgets. Under additivity the allocation is exact (a knapsack solved by dynamic
programming); how far damages are from additive is what the evolutionary search is for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvpress.matryoshka.bases import Ranks
from kvpress.matryoshka.entries import Entries, Score, Shapes, Watch, check_budget


@dataclass(frozen=True)
class Sensitivity:
    """damage[i][j]: score with entry i alone at rank (j + 1) * its step, less the score of full ranks; 0 at the full rank."""

    entries: Entries
    damage: tuple[tuple[float, ...], ...]

    def allocate(self, share: float) -> Ranks:
        """The ranks of least total damage within a share of the native bytes.

        Raises:
            InputError: the share is too small.
        """
        entries = self.entries
        budget = entries.budget(share)
        unit = math.gcd(*entries.steps)
        size = budget // unit
        best = np.full(size + 1, np.inf)
        best[0] = 0.0
        choices = []
        for step, damage in zip(entries.steps, self.damage, strict=True):
            after, chosen = np.full(size + 1, np.inf), np.zeros(size + 1, np.int64)
            for level, cost in enumerate(damage):
                width = (level + 1) * step // unit
                if width > size:
                    break
                shifted = np.concatenate([np.full(width, np.inf), best[: size + 1 - width] + cost])
                better = shifted < after
                after[better], chosen[better] = shifted[better], level
            choices.append(chosen)
            best = after
        at, flat = int(best.argmin()), list[int]()
        for step, chosen in zip(reversed(entries.steps), reversed(choices), strict=True):
            flat.append((int(chosen[at]) + 1) * step)
            at -= flat[-1] // unit
        return check_budget(entries, flat[::-1], budget)


def measure_sensitivity(
    score: Score, shapes: Shapes, step: int | None = None, watch: Watch = lambda done, total: None
) -> Sensitivity:
    """Score every entry at every rank below its full one.

    A damage can come out below zero by the noise of a short text; it counts as it is measured, but never less than that of a higher rank.

    Raises:
        InputError: the step does not divide the dimensions.
    """
    entries = Entries.of(shapes, step)
    full = list(entries.limits)
    base, done = score(entries.ranks(full)), 0
    total = sum(limit // step - 1 for limit, step in zip(entries.limits, entries.steps, strict=True))
    damage = []
    for index, (limit, one) in enumerate(zip(entries.limits, entries.steps, strict=True)):
        row = []
        for rank in range(one, limit, one):
            row.append(score(entries.ranks([*full[:index], rank, *full[index + 1 :]])) - base)
            done += 1
            watch(done, total)
        damage.append(tuple(_falling([*row, 0.0])))
    return Sensitivity(entries, tuple(damage))


def _falling(row: Sequence[float]) -> list[float]:
    """The row made non-increasing: a lower rank never counts as better than a higher one."""
    return list(np.maximum.accumulate(np.asarray(row)[::-1])[::-1])
