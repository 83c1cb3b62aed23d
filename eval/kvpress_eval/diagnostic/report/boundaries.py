"""The host's boundary: what other rankings exchange there, and how well rankings order single units (arXiv 2605.08234 Table 19)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvpress_eval.diagnostic.finding import ExchangeMeasures
from kvpress_eval.diagnostic.report.grid import Grid
from kvpress_eval.diagnostic.report.means import Mean, mean, share
from kvpress_eval.records import Mode

_ANY, _SHARE = (-math.inf, math.inf), (0.0, 1.0)
Cluster = tuple[str, int | None, str]


@dataclass(frozen=True)
class ExchangeRow:
    """One ranking at one budget, None for all together. exchanged, near: shares, 0 to 1. gain, chance: nats; advantage: gain minus chance of
    the same samples. improved: percent of the samples that exchange anything in which the gain is above 0."""

    mode: Mode
    budget: str | None
    arm: str
    n: int
    exchanged: Mean
    near: Mean
    gain: Mean
    chance: Mean
    advantage: Mean
    improved: Mean


@dataclass(frozen=True)
class UnitRow:
    """One ranking's order of single units against the measured divergence: Spearman, and AUC for the half with the larger one."""

    mode: Mode
    budget: str | None
    ranking: str
    n: int
    spearman: Mean
    auc: Mean


def exchange_rows(grid: Grid) -> list[ExchangeRow]:
    """Arms that differ from the host in the ranking alone, where the boundary was looked at."""
    found = []
    for scope in grid.scopes:
        for arm in grid.arms:
            each = [
                (one.finding.exchange, one.cluster)
                for one in grid.measured(arm, scope)
                if one.finding.exchange is not None
            ]
            if each:
                found.append(_exchange_row(grid.mode, scope, arm, each))
    return found


def _exchange_row(
    mode: Mode, scope: str | None, arm: str, each: Sequence[tuple[ExchangeMeasures, Cluster]]
) -> ExchangeRow:
    def over(of: Callable[[ExchangeMeasures], float | None], bounds: tuple[float, float] = _ANY) -> Mean:
        given = [(value, cluster) for one, cluster in each if (value := of(one)) is not None]
        return mean([value for value, _ in given], [cluster for _, cluster in given], bounds)

    moved = [(one, cluster) for one, cluster in each if one.exchanged > 0]
    return ExchangeRow(
        mode=mode,
        budget=scope,
        arm=arm,
        n=len(each),
        exchanged=over(lambda one: one.exchanged, _SHARE),
        near=over(lambda one: one.near, _SHARE),
        gain=over(lambda one: one.gain),
        chance=over(lambda one: one.chance),
        advantage=over(lambda one: None if one.chance is None else one.gain - one.chance),
        improved=share([one.gain > 0 for one, _ in moved], [cluster for _, cluster in moved]),
    )


def unit_rows(grid: Grid) -> list[UnitRow]:
    """Every ranking that was held against single units, at each budget and at all."""
    found = []
    for scope in grid.scopes:
        each = [
            (one.finding.units, one.cluster) for one in grid.measured(grid.host, scope) if one.finding.units is not None
        ]
        for ranking in dict.fromkeys(name for units, _ in each for name in units.spearman):
            rank = [(value, cluster) for units, cluster in each if (value := units.spearman.get(ranking)) is not None]
            auc = [(value, cluster) for units, cluster in each if (value := units.auc.get(ranking)) is not None]
            found.append(
                UnitRow(
                    mode=grid.mode,
                    budget=scope,
                    ranking=ranking,
                    n=sum(ranking in units.spearman for units, _ in each),
                    spearman=mean([value for value, _ in rank], [cluster for _, cluster in rank], (-1.0, 1.0)),
                    auc=mean([value for value, _ in auc], [cluster for _, cluster in auc], _SHARE),
                )
            )
    return found
