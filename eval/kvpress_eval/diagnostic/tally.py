"""Counts and sums over cells by task, and every number that is made of them.

All numbers on signs are functions of a few sums: cells by class of margin and class of delta, deltas by class of
margin, and the moments of both. A study is summed once by task; leaving a task out is a subtraction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvpress_eval.diagnostic.cells import Array
from kvpress_eval.diagnostic.crossfit import Draws
from kvpress_eval.diagnostic.margins import NEGATIVE, POSITIVE, TIE, classes
from kvpress_eval.diagnostic.quantity import Kind, Quantity, quantity

_CLASSES = (POSITIVE, TIE, NEGATIVE)
#: margin classes of the published groups, and the three classes
GROUPS: dict[str, tuple[int, ...]] = {
    "favourable": (POSITIVE,),
    "unfavourable": (TIE, NEGATIVE),
    "positive": (POSITIVE,),
    "tie": (TIE,),
    "negative": (NEGATIVE,),
    "all": _CLASSES,
}


@dataclass(frozen=True)
class Tally:
    """Sums, means over draws. counts [..., 3, 3]: cells by class of margin and of delta; deltas [..., 3]: sum of
    delta by class of margin; moments [..., 6]: sums of 1, m, d, m^2, d^2, m d. Classes in the order positive, tie,
    negative."""

    counts: Array
    deltas: Array
    moments: Array

    def total(self) -> Tally:
        """Over all tasks."""
        return Tally(self.counts.sum(0), self.deltas.sum(0), self.moments.sum(0))

    def without_each(self) -> Tally:
        """[n_tasks, ...] over all tasks but one."""
        whole = self.total()
        return Tally(whole.counts - self.counts, whole.deltas - self.deltas, whole.moments - self.moments)

    def cells(self, group: str, outcomes: tuple[int, ...] = _CLASSES) -> Array:
        """[...] cells whose margin is in the group and whose delta is in one of the classes."""
        rows = [_CLASSES.index(each) for each in GROUPS[group]]
        columns = [_CLASSES.index(each) for each in outcomes]
        return np.asarray(self.counts[..., rows, :][..., columns].sum((-1, -2)))

    def share(self, group: str, outcomes: tuple[int, ...]) -> Array:
        """Percent of the group's cells whose delta is in one of the classes."""
        return 100 * _ratio(self.cells(group, outcomes), self.cells(group))

    def mean_delta(self, group: str) -> Array:
        """Points."""
        rows = [_CLASSES.index(each) for each in GROUPS[group]]
        return _ratio(self.deltas[..., rows].sum(-1), self.cells(group))

    @property
    def rate_gap(self) -> Array:
        """Share of positive deltas, favourable minus unfavourable, percentage points (arXiv 2605.08234 Table 12)."""
        return self.share("favourable", (POSITIVE,)) - self.share("unfavourable", (POSITIVE,))

    @property
    def win_gap(self) -> Array:
        """As the rate gap, with a tied delta as half a win, and of cells with positive margin against those with
        negative one (ours). Ties count for neither side; the rate gap is also moved by where the ties are."""
        first, last = (
            (self.share(group, (POSITIVE,)) + self.share(group, (POSITIVE, TIE))) / 2
            for group in ("positive", "negative")
        )
        return first - last

    @property
    def mean_gap(self) -> Array:
        """Mean delta, favourable minus unfavourable, points."""
        return self.mean_delta("favourable") - self.mean_delta("unfavourable")

    @property
    def match(self) -> Array:
        """Percent of cells with delta > 0 if and only if m > 0, the published prediction."""
        hits = self.cells("favourable", (POSITIVE,)) + self.cells("unfavourable", (TIE, NEGATIVE))
        return 100 * _ratio(hits, self.counts.sum((-1, -2)))

    @property
    def match_of_classes(self) -> Array:
        """Percent of cells whose margin and delta are of the same of three classes (ours): a tie matches a tie
        alone."""
        return 100 * _ratio(np.trace(self.counts, axis1=-2, axis2=-1), self.counts.sum((-1, -2)))

    @property
    def correlation(self) -> Array:
        """Pearson's r of margin and delta, NaN where one of them does not vary."""
        n, m, d, mm, dd, md = np.moveaxis(self.moments, -1, 0)
        spread = np.maximum(n * mm - m**2, 0) * np.maximum(n * dd - d**2, 0)
        varies = (n * mm - m**2 > 1e-9 * n * mm) & (n * dd - d**2 > 1e-9 * n * dd)
        return np.asarray(np.where(varies, _ratio(n * md - m * d, np.sqrt(spread)), np.nan))


def tally(draws: Draws, tolerance: float, threshold: float = 0.0) -> Tally:
    """[n_tasks, ...] sums of a study.

    threshold: with one above 0, cells count as positive for m > threshold and as negative for m <= -threshold; those
    between are in no group (arXiv 2605.08234 Tables 2, 12). At 0 those between are ties.
    """
    margin = classes(draws.first, tolerance)
    if threshold > tolerance:
        margin = (draws.first > threshold).astype(np.int8) - (draws.first <= -threshold).astype(np.int8)
        counted = margin != 0
    else:
        counted = np.ones(margin.shape, dtype=bool)
    outcome = classes(draws.second, tolerance)
    n_draws = margin.shape[1]
    groups = np.stack([counted & (margin == each) for each in _CLASSES], -1).astype(np.float64)
    outcomes = np.stack([outcome == each for each in _CLASSES], -1).astype(np.float64)
    m, d = draws.first * counted, draws.second * counted
    moments = np.stack([counted.astype(np.float64), m, d, m * m, d * d, m * d], -1)
    by_task = np.equal.outer(np.arange(draws.n_tasks), draws.task) / n_draws
    groups = groups.transpose(0, 2, 1)
    return Tally(
        counts=np.tensordot(by_task, groups @ outcomes, 1),
        deltas=by_task @ (groups @ draws.second[..., None])[..., 0],
        moments=by_task @ moments.sum(1),
    )


def measured(
    of: Tally, kind: Kind, number: Callable[[Tally], Array], groups: tuple[str, ...], confidence: float
) -> Quantity:
    """A number with its interval. of: [n_tasks, ...]; groups: those that the number needs."""
    weights = np.stack([of.cells(group) for group in groups], -1)
    return quantity(kind, float(number(of.total())), number(of.without_each()), weights, confidence)


def _ratio(above: Array, below: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(below > 1e-12, above / below, np.nan))
