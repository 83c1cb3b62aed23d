"""What was measured in each stage, as means over the samples of an arm; definitions are in `diagnostic/finding.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvpress_eval.diagnostic.finding import Finding
from kvpress_eval.diagnostic.report.grid import Grid, Measured
from kvpress_eval.diagnostic.report.means import Mean, mean
from kvpress_eval.records import Mode

_SHARE, _POSITIVE, _ANY = (0.0, 1.0), (0.0, math.inf), (-math.inf, math.inf)
#: Prop. 3 holds for every head, so for their means as well, up to the rounding of single precision
BOUND_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Measure:
    """One number of a finding. of: None where it was not measured; bounds: what it can be."""

    words: str
    of: Callable[[Finding], float | None]
    bounds: tuple[float, float]


def _access(name: str) -> Callable[[Finding], float | None]:
    return lambda finding: None if finding.access is None else getattr(finding.access, name)


def _value(name: str) -> Callable[[Finding], float | None]:
    return lambda finding: None if finding.value is None else getattr(finding.value, name)


def _fit(name: str) -> Callable[[Finding], float | None]:
    return lambda finding: None if finding.fit is None else getattr(finding.fit, name)


def _margin(name: str) -> Callable[[Finding], float | None]:
    return lambda finding: None if finding.margin is None else getattr(finding.margin, name)


def _bound(finding: Finding) -> float | None:
    return None if finding.access is None else finding.access.tv_phase + finding.access.tv_fit


#: by name; the order is that of the tables
MEASURES: dict[str, Measure] = {
    "kept_decode": Measure("of decode attention kept", _access("kept_decode"), _SHARE),
    "tv_decode": Measure("distance of the arm's law from p*", _access("tv_decode"), _SHARE),
    "tv_first": Measure("TV(p*, tail_K), first step", _access("tv_first"), _SHARE),
    "tv_phase": Measure("TV(p*, p_T)", _access("tv_phase"), _SHARE),
    "tv_fit": Measure("TV(p_T, tail_K) = eta_proj", _access("tv_fit"), _SHARE),
    "tv_bound": Measure("right side of Prop. 3", _bound, (0.0, 2.0)),
    "gold_tokens": Measure("of the evidence's tokens kept", _access("gold_tokens"), _SHARE),
    "gold_whole": Measure("of the facts kept whole", _access("gold_whole"), _SHARE),
    "gold_broken": Measure("of the facts broken", _access("gold_broken"), _SHARE),
    "group_broken": Measure("of heads with a broken group", _access("group_broken"), _SHARE),
    "predicted": Measure("output change predicted", _value("predicted"), _POSITIVE),
    "measured": Measure("output change measured", _value("measured"), _POSITIVE),
    "agreement": Measure("agreement over heads (Spearman)", _value("agreement"), (-1.0, 1.0)),
    "eps_lat": Measure("tokens of the budget unused", _fit("eps_lat"), _POSITIVE),
    "ties": Measure("ties", _fit("ties"), _POSITIVE),
    "kept_mass": Measure("of the evidence mass kept", _fit("kept_mass"), _SHARE),
    "lowest": Measure("lowest logit margin", _margin("lowest"), _ANY),
    "log_probability": Measure("log probability a token", _margin("log_probability"), (-math.inf, 0.0)),
    "divergence": Measure("KL(full || arm), nats a token", _margin("divergence"), _POSITIVE),
}


@dataclass(frozen=True)
class MeasureRow:
    """One arm at one budget, None for all together. values: by the names of MEASURES. bound_holds: samples, of bound_n, in which the left side of
    Prop. 3 is not above the right one. by_layer: output change of each compressed layer, by model, whose layers are its own."""

    mode: Mode
    budget: str | None
    arm: str
    n: int
    values: dict[str, Mean]
    bound_holds: int
    bound_n: int
    by_layer: dict[str, tuple[Mean, ...]]


def measure_rows(grid: Grid) -> list[MeasureRow]:
    """The host and every arm that has findings, at each budget and at all."""
    found = []
    for scope in grid.scopes:
        for arm in grid.arms:
            each = list(grid.measured(arm, scope))
            if each:
                found.append(_row(grid, arm, scope, each))
    return found


def _row(grid: Grid, arm: str, scope: str | None, each: Sequence[Measured]) -> MeasureRow:
    sides = [one.finding.access for one in each if one.finding.access is not None]
    return MeasureRow(
        mode=grid.mode,
        budget=scope,
        arm=arm,
        n=len(each),
        values={name: _mean(measure, each) for name, measure in MEASURES.items()},
        bound_holds=sum(side.tv_first <= side.tv_phase + side.tv_fit + BOUND_TOLERANCE for side in sides),
        bound_n=len(sides),
        by_layer={run.model: _layers([one for one in each if one.place.model == run.model]) for run in grid.runs},
    )


def _mean(measure: Measure, each: Sequence[Measured]) -> Mean:
    given = [(value, one.cluster) for one in each if (value := measure.of(one.finding)) is not None]
    return mean([value for value, _ in given], [cluster for _, cluster in given], measure.bounds)


def _layers(each: Sequence[Measured]) -> tuple[Mean, ...]:
    """Samples of one model; all of its findings have the same layers."""
    curves = [(one.finding.value.by_layer, one.cluster) for one in each if one.finding.value is not None]
    clusters = [cluster for _, cluster in curves]
    return tuple(mean(values, clusters, _POSITIVE) for values in zip(*(curve for curve, _ in curves), strict=True))
