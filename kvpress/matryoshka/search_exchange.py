"""A search around the budget itself: move steps of rank from where they are worth least to where they are worth most.

A backward pass says at once what the last kept and the first dropped step of every entry are worth, at the budget and together, which
`sensitivity` asks for each entry by itself with all others full. A round costs a few passes over the text, whatever the number of entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvpress.matryoshka.bases import Ranks
from kvpress.matryoshka.entries import Entries, Score, Shapes, Watch, check_budget

#: ranks and steps -> for every entry what the score would rise by without its last kept step, and fall by with its first dropped one
Worth = Callable[[Entries, Sequence[int]], tuple[list[float], list[float]]]


def exchange(
    score: Score,
    worth: Worth,
    shapes: Shapes,
    share: float,
    *,
    rounds: int = 4,
    step: int | None = None,
    watch: Watch = lambda done, total: None,
) -> Ranks:
    """Ranks within a share of the native bytes, never worse by `score` than the same share of every entry, where it starts.

    An entry gives or takes one step a round. The worth of steps is a slope, true for small moves, so a round tries all exchanges that
    promise something, then the better half of them, and so on, and keeps the best that is better than nothing; the search ends where
    none is. Entries exchange with those of the same step.

    Raises:
        InputError: the step does not divide the dimensions, or the share is too small.
    """
    entries = Entries.of(shapes, step)
    budget = entries.budget(share)
    flat = _even(entries, budget)
    error = score(entries.ranks(flat))
    for done in range(rounds):
        watch(done, rounds)
        moves = _exchanges(entries, flat, *worth(entries, flat))
        best = error, flat
        while moves:
            candidate = _moved(entries, flat, moves)
            found = score(entries.ranks(candidate))
            if found < best[0]:
                best = found, candidate
            elif best[1] is not flat:
                break
            moves = moves[: len(moves) // 2]
        if best[1] is flat:
            break
        error, flat = best
    watch(rounds, rounds)
    return check_budget(entries, flat, budget)


def _even(entries: Entries, budget: int) -> list[int]:
    """The same share of every entry as nearly as the steps allow: the entry with the lowest share is raised as long as one fits."""
    flat, left = list(entries.steps), budget - sum(entries.steps)
    while True:
        fits = [i for i, step in enumerate(entries.steps) if step <= left and flat[i] + step <= entries.limits[i]]
        if not fits:
            return flat
        lowest = min(fits, key=lambda i: flat[i] / entries.limits[i])
        flat[lowest] += entries.steps[lowest]
        left -= entries.steps[lowest]


def _exchanges(
    entries: Entries, flat: Sequence[int], last: Sequence[float], following: Sequence[float]
) -> list[tuple[int, int]]:
    """(giver, taker) of the exchanges that promise a lower score, the most promising first; no entry is in two."""
    found, used = list[tuple[float, int, int]](), set[int]()
    for giver in sorted((i for i, step in enumerate(entries.steps) if flat[i] > step), key=lambda i: last[i]):
        step = entries.steps[giver]
        takers = [
            i
            for i, limit in enumerate(entries.limits)
            if i not in used and i != giver and entries.steps[i] == step and flat[i] + step <= limit
        ]
        taker = max(takers, key=lambda i: following[i], default=giver)
        if giver not in used and following[taker] > last[giver]:
            used |= {giver, taker}
            found.append((following[taker] - last[giver], giver, taker))
    return [(giver, taker) for _, giver, taker in sorted(found, reverse=True)]


def _moved(entries: Entries, flat: Sequence[int], moves: Sequence[tuple[int, int]]) -> list[int]:
    moved = list(flat)
    for giver, taker in moves:
        moved[giver] -= entries.steps[giver]
        moved[taker] += entries.steps[taker]
    return moved
