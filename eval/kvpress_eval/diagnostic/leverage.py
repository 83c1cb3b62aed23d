"""What leverage adds: MII against NoLev, the same score without the factor (1 - a)^-2.

arXiv 2605.08234 section 4, Table 9, App. K.3.

residual = MII - NoLev. By their lifts over the host, with ties among "not better", as published:

    rescue            NoLev <= 0 and MII > 0
    break             NoLev > 0 and MII <= 0
    tax               both > 0 and MII < NoLev
    support failure   both <= 0

The last is ours: neither scalar helps, so what is missing is not the scalar. The paper does not define the term; this
reading gives its count in five of the six rows of Table 20, and 7 instead of 6 in the other.

Signs of two lifts over one host agree by the host's noise alone, as margins and deltas do. So the cross-fitted
numbers take the lift of NoLev from one half of the samples and that of MII from the other; with no effect they agree
no more often than chance. The residual itself has no host in it and can be read raw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvpress_eval.diagnostic.cells import Array, Cell
from kvpress_eval.diagnostic.crossfit import Draws, LeftOut, Study
from kvpress_eval.diagnostic.margins import classes
from kvpress_eval.diagnostic.quantity import Quantity, mean_over_cells
from kvpress_eval.diagnostic.sign_settings import SignSettings


@dataclass(frozen=True)
class Count:
    """Cells, over splits on average, and their percent of all."""

    cells: float
    share: Quantity


@dataclass(frozen=True)
class LeverageSplit:
    """agreement: both lifts are positive, or neither; opposite: one is positive and the other negative, no tie;
    residual_match: residual and MII's lift are both positive, or neither."""

    agreement: Count
    opposite: Count
    residual_match: Count
    rescues: Count
    breaks: Count
    taxes: Count
    support_failures: Count


@dataclass(frozen=True)
class Leverage:
    """mean_*: over cells, points. wins, losses, ties: cells by MII's lift, all samples. raw: all
    samples for both; cross_fitted: a half for each."""

    host: str
    nolev: str
    mii: str
    n_cells: int
    mean_residual: Quantity
    mean_nolev: Quantity
    mean_mii: Quantity
    wins: int
    losses: int
    ties: int
    raw: LeverageSplit
    cross_fitted: LeverageSplit
    left_out: tuple[LeftOut, ...]


def leverage(
    cells: Sequence[Cell], host: str, nolev: str, mii: str, *, settings: SignSettings | None = None, seed: int = 0
) -> Leverage:
    """Compare MII with NoLev, both against one host.

    Raises:
        InputError: no cell can be split, or one lacks a contract.
    """
    settings = settings or SignSettings()
    lifts = Study.of(cells, (nolev, host), (mii, host), settings.min_clusters)
    residuals = Study.of(cells, (mii, nolev), (mii, host), settings.min_clusters)
    raw, residual = lifts.raw(), residuals.raw()
    mean = partial(mean_over_cells, "points", task=lifts.task, confidence=settings.confidence)
    outcome = classes(raw.second, settings.tolerance)
    return Leverage(
        host=host,
        nolev=nolev,
        mii=mii,
        n_cells=len(lifts.keys),
        mean_residual=mean(residual.first[:, 0]),
        mean_nolev=mean(raw.first[:, 0]),
        mean_mii=mean(raw.second[:, 0]),
        wins=int((outcome > 0).sum()),
        losses=int((outcome < 0).sum()),
        ties=int((outcome == 0).sum()),
        raw=_split(raw, residual, settings),
        cross_fitted=_split(
            lifts.cross_fitted(settings.repeats, seed), residuals.cross_fitted(settings.repeats, seed), settings
        ),
        left_out=lifts.left_out,
    )


def _split(lifts: Draws, residuals: Draws, settings: SignSettings) -> LeverageSplit:
    nolev, mii = classes(lifts.first, settings.tolerance), classes(lifts.second, settings.tolerance)
    # a tax needs no residual of its own: cross-fitted, both lifts come from halves of their own
    lower = lifts.second < lifts.first - settings.tolerance
    residual = classes(residuals.first, settings.tolerance)
    lift = classes(residuals.second, settings.tolerance)

    def count(hits: NDArray[np.bool_]) -> Count:
        rates: Array = hits.mean(axis=1)
        return Count(float(rates.sum()), mean_over_cells("share", 100 * rates, lifts.task, settings.confidence))

    return LeverageSplit(
        agreement=count((nolev > 0) == (mii > 0)),
        opposite=count(nolev * mii < 0),
        residual_match=count((residual > 0) == (lift > 0)),
        rescues=count((nolev <= 0) & (mii > 0)),
        breaks=count((nolev > 0) & (mii <= 0)),
        taxes=count((nolev > 0) & (mii > 0) & lower),
        support_failures=count((nolev <= 0) & (mii <= 0)),
    )
