"""An evolutionary search over ranks at equal bytes, in the spirit of EvoPress (arXiv 2410.14649): damages need not add up.

A child moves dimensions from some entries to others. Selection is in rounds: all children on few windows, the best of them on more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvpress.matryoshka.bases import Ranks
from kvpress.matryoshka.entries import Entries, Shapes, Watch, check_budget

#: (ranks, windows) -> score over the first so many calibration windows
PartialScore = Callable[[Ranks, int], float]


@dataclass(frozen=True)
class Round:
    """One round of selection: so many survive a look at so many windows."""

    survivors: int
    windows: int


def evolve(
    score: PartialScore,
    shapes: Shapes,
    start: Ranks,
    *,
    generations: int = 20,
    children: int = 16,
    rounds: Sequence[Round] = (Round(4, 1), Round(1, 4)),
    max_moves: int = 3,
    step: int | None = None,
    seed: int = 0,
    watch: Watch = lambda done, total: None,
) -> Ranks:
    """Better ranks with no more bytes than `start`. The parent takes part in the last round, so nothing ever gets worse there.

    Raises:
        InputError: the step does not divide the dimensions.
    """
    entries = Entries.of(shapes, step)
    generator = np.random.default_rng(seed)
    parent = entries.flat(start)
    budget = sum(parent)
    per_generation = sum(
        n * r.windows for n, r in zip([children, *(r.survivors + 1 for r in rounds)], rounds, strict=False)
    )
    done = 0
    for _ in range(generations):
        alive = [_child(parent, entries, generator, max_moves) for _ in range(children)]
        for index, one in enumerate(rounds):
            if index == len(rounds) - 1:
                alive.append(parent)
            alive = sorted(alive, key=lambda flat: score(entries.ranks(flat), one.windows))[: one.survivors]
        parent = alive[0]
        done += per_generation
        watch(done, per_generation * generations)
    return check_budget(entries, parent, budget)


def _child(parent: list[int], entries: Entries, generator: np.random.Generator, max_moves: int) -> list[int]:
    """A copy in which one to `max_moves` steps have gone from one entry to another with the same step."""
    child = list(parent)
    for _ in range(int(generator.integers(1, max_moves + 1))):
        givers = [i for i, (rank, step) in enumerate(zip(child, entries.steps, strict=True)) if rank > step]
        if not givers:
            break
        giver = int(generator.choice(givers))
        step = entries.steps[giver]
        takers = [
            i
            for i, (rank, limit) in enumerate(zip(child, entries.limits, strict=True))
            if i != giver and entries.steps[i] == step and rank + step <= limit
        ]
        if takers:
            child[giver] -= step
            child[int(generator.choice(takers))] += step
    return child
