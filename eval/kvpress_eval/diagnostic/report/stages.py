"""The stage ladder: the score of every arm, and what each swap changes against its base.

Scores are means over tasks, which count alike; intervals are those of an evaluation (`statistics.interval`), paired and by cluster.
A change counts as shown where its interval does not hold 0 and its p, by Holm over the arms of one budget and mode, is below 0.05: of twenty arms
that do nothing, one interval would leave out 0 by chance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kvpress_eval.diagnostic.finding import Stage
from kvpress_eval.diagnostic.report.grid import Grid, strata
from kvpress_eval.diagnostic.report.means import Mean
from kvpress_eval.diagnostic.study import Comparison
from kvpress_eval.records import FULL, Mode
from kvpress_eval.report.rows import points
from kvpress_eval.statistics import Estimate, Stratum, holm, sign_flip
from kvpress_eval.statistics.equivalence import SIGNIFICANCE
from kvpress_eval.statistics.strata import generator


@dataclass(frozen=True)
class Level:
    """The score of one arm, points. budget: None for all together. to_host, to_full: paired differences; None for itself."""

    mode: Mode
    budget: str | None
    arm: str
    n_tasks: int
    score: Mean
    to_host: Mean | None
    to_full: Mean | None


@dataclass(frozen=True)
class Step:
    """One comparison, points. label: "diagnostic" or "transfer". p: of arm and base being exchangeable; p_adjusted: by Holm, the null
    arm's own. interval: the rule that gave the difference's. shown: what the difference shows, None where nothing."""

    mode: Mode
    budget: str | None
    arm: str
    base: str
    stage: Stage
    label: str
    role: str
    slots: tuple[str, ...]
    n_tasks: int
    score: Mean
    base_score: Mean
    difference: Mean
    interval: str
    p: float | None
    p_adjusted: float | None
    shown: Literal["better", "worse"] | None


class Estimates:
    """Intervals of macro means in points. The same values are resampled once, all with the same draws."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed = name, seed
        self._found: dict[tuple[bytes, ...], tuple[Mean, str]] = {}

    def of(self, of_tasks: Sequence[Stratum], bounds: tuple[float, float]) -> tuple[Mean, str]:
        """The mean over tasks of values in `bounds` (shares of the score), and the rule of its interval."""
        key = (repr(bounds).encode(), *(part.tobytes() for one in of_tasks for part in (one.sums, one.sizes)))
        if key not in self._found:
            estimate = Estimate(of_tasks, bounds, ("ladder", self.name), self.seed)
            found, n = estimate.interval(), sum(one.n_clusters for one in of_tasks)
            self._found[key] = (
                Mean(points(estimate.mean), points(found.low), points(found.high), estimate.n, n),
                estimate.rule,
            )
        return self._found[key]


def levels(grid: Grid, estimates: Estimates) -> list[Level]:
    """The full cache, the host and every arm, at each budget and at all."""
    return [
        level
        for scope in grid.scopes
        for arm in (FULL, *grid.arms)
        if (level := _level(grid, arm, scope, estimates)) is not None
    ]


def _level(grid: Grid, arm: str, scope: str | None, estimates: Estimates) -> Level | None:
    found = grid.pairs(grid.host if arm == FULL else arm, FULL, scope)
    if not found:
        return None
    scores = strata(found, lambda pairs: pairs.full if arm == FULL else pairs.arm)
    to_host = grid.pairs(arm, grid.host, scope) if arm not in (FULL, grid.host) else []
    if arm == FULL:
        change = strata(found, lambda pairs: pairs.full - pairs.arm)
    else:
        change = strata(to_host, lambda pairs: pairs.arm - pairs.full)
    return Level(
        mode=grid.mode,
        budget=scope,
        arm=arm,
        n_tasks=len(scores),
        score=estimates.of(scores, (0.0, 1.0))[0],
        to_host=estimates.of(change, (-1.0, 1.0))[0] if change else None,
        to_full=None if arm == FULL else estimates.of(strata(found, lambda p: p.arm - p.full), (-1.0, 1.0))[0],
    )


def steps(grid: Grid, estimates: Estimates, seed: int) -> list[Step]:
    """Every comparison of the study, by stage, at each budget and at all; the null arm first."""
    found = []
    for scope in grid.scopes:
        of_scope = [
            step for each in grid.comparisons if (step := _step(grid, each, scope, estimates, seed)) is not None
        ]
        found += _judged(of_scope)
    return found


def _step(grid: Grid, each: Comparison, scope: str | None, estimates: Estimates, seed: int) -> Step | None:
    found = grid.pairs(each.arm, each.base, scope)
    if not found:
        return None
    differences = strata(found, lambda pairs: pairs.arm - pairs.full)
    difference, rule = estimates.of(differences, (-1.0, 1.0))
    return Step(
        mode=grid.mode,
        budget=scope,
        arm=each.arm,
        base=each.base,
        stage=each.stage,
        label=each.label,
        role=each.role,
        slots=each.slots,
        n_tasks=len(differences),
        score=estimates.of(strata(found, lambda pairs: pairs.arm), (0.0, 1.0))[0],
        base_score=estimates.of(strata(found, lambda pairs: pairs.full), (0.0, 1.0))[0],
        difference=difference,
        interval=rule,
        p=None if rule == "none" else sign_flip(differences, generator(seed, "ladder flip", grid.mode)),
        p_adjusted=None,
        shown=None,
    )


def _judged(of_scope: list[Step]) -> list[Step]:
    """With p values adjusted over the arms of one budget; the null arm is no hypothesis of ours and is left out of the count."""
    tested = [step for step in of_scope if step.p is not None and step.role != "null"]
    adjusted = dict(zip((step.arm for step in tested), holm([step.p or 0.0 for step in tested]), strict=True))
    found = []
    for step in of_scope:
        p = adjusted.get(step.arm, step.p)
        is_shown = p is not None and p < SIGNIFICANCE and step.difference.excludes_zero
        sign: Literal["better", "worse"] = "better" if (step.difference.value or 0) > 0 else "worse"
        found.append(replace(step, p_adjusted=p, shown=sign if is_shown else None))
    return found


def rungs(comparisons: Sequence[Comparison], host: str, stage: Stage) -> list[str]:
    """The arms of one stage in the order of their ladder: those that build on each other, the host, the others, the oracle.

    For access that is cumulative, debiased, proximal, host, ..., oracle.
    """
    of_stage = [each for each in comparisons if each.stage == stage and each.role != "null"]
    names, bases = {each.arm for each in of_stage}, defaultdict(list)
    for each in of_stage:
        bases[each.base].append(each.arm)
    chained = [each.arm for each in of_stage if each.role == "arm" and (each.base in names or each.arm in bases)]
    others = [each.arm for each in of_stage if each.role == "arm" and each.arm not in chained]
    # a chain below the host leads up to it in access; in the other stages the host is where every chain begins
    before, after = (chained, others) if stage == "access" else ([], [*others, *chained])
    return [*before, host, *after, *(each.arm for each in of_stage if each.role == "oracle")]


def stage_levels(found: Sequence[Level], names: Sequence[str], mode: Mode, budget: str | None) -> Iterator[Level]:
    """The levels of these arms at one budget, in this order."""
    by_name = {level.arm: level for level in found if (level.mode, level.budget) == (mode, budget)}
    for name in names:
        if name in by_name:
            yield by_name[name]
