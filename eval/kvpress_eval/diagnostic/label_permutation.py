"""The permutation null of the direction match: how often would margins and deltas agree if they were unrelated?

Margins are shuffled among the cells of one model, budget and mode; each cell keeps its delta (arXiv 2605.08234 Table
13). That removes what the rates alone explain: with 65 % of margins and 58 % of deltas positive, half of the cells
match by chance. It does not remove the shared-host artefact: the shuffle breaks the link through the host's noise
together with the real one, so in the raw split a small p says no more than "there is a link" (`artefact` measures
that part). It also treats the cells of a task as exchangeable with those of others, so its range is too narrow where
a task's cells resemble each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvpress_eval.diagnostic.cells import CellKey
from kvpress_eval.diagnostic.crossfit import Draws
from kvpress_eval.diagnostic.margins import is_favourable


@dataclass(frozen=True)
class PermutationNull:
    """Percent. observed: direction match; expected: its mean over shuffles; low, high: the middle share of shuffles;
    p: one-sided, (hits + 1) / (n + 1)."""

    observed: float
    expected: float
    low: float
    high: float
    p: float
    n_permutations: int
    n_cells: int


def permute_labels(
    draws: Draws,
    keys: Sequence[CellKey],
    tolerance: float,
    rng: np.random.Generator,
    *,
    n_permutations: int,
    confidence: float = 0.95,
) -> PermutationNull:
    """Shuffle margins within (model, budget, mode). keys: [n_cells] of the draws."""
    favourable = is_favourable(draws.first, tolerance).astype(np.float64)
    positive = (draws.second > tolerance).astype(np.float64)
    #: [n_cells, n_cells] share of draws in which the margin of one cell agrees with the delta of another
    agreement = (favourable @ positive.T + (1 - favourable) @ (1 - positive).T) / favourable.shape[1]
    strata = [(key.model, key.budget, key.mode) for key in keys]
    number = np.array([sorted(set(strata)).index(each) for each in strata], dtype=np.float64)
    observed = 100 * float(np.diag(agreement).mean())
    place = np.argsort(number, kind="stable")
    shuffled = np.argsort(number + rng.random((n_permutations, len(keys))), axis=1)
    matches = 100 * agreement[shuffled, place].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(matches, [tail, 1 - tail])
    hits = int((matches >= observed - 1e-9).sum())
    return PermutationNull(
        observed=observed,
        expected=float(matches.mean()),
        low=float(low),
        high=float(high),
        p=(hits + 1) / (n_permutations + 1),
        n_permutations=n_permutations,
        n_cells=len(keys),
    )
