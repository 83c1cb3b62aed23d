"""The paper's search (arXiv 2410.14731, algorithm 1): lower the entry that hurts least, again and again, until the bytes are met.

Each round scores every entry once, against the full model: entries x rounds passes over the calibration text, for small models and
short texts. The published code differs (its error is one of hidden states, against the truncated model); this is the algorithm.
"""

from __future__ import annotations

from kvpress.matryoshka.bases import Ranks
from kvpress.matryoshka.entries import Entries, Score, Shapes, Watch, check_budget


def greedy(
    score: Score, shapes: Shapes, share: float, step: int | None = None, watch: Watch = lambda done, total: None
) -> Ranks:
    """Ranks within a share of the native bytes.

    Raises:
        InputError: the step does not divide the dimensions, or the share is too small.
    """
    entries = Entries.of(shapes, step)
    budget, flat = entries.budget(share), list(entries.limits)
    n_rounds = -(-(sum(flat) - budget) // min(entries.steps))
    done = 0
    while sum(flat) > budget:
        best: tuple[float, list[int]] | None = None
        for _, candidate in entries.lowered(flat):
            error = score(entries.ranks(candidate))
            done += 1
            watch(done, n_rounds * len(entries))
            if best is None or error < best[0]:
                best = error, candidate
        assert best is not None, "the budget was checked to be above the lowest ranks"
        flat = best[1]
    return check_budget(entries, flat, budget)
