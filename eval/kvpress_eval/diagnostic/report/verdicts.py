"""In which stage answers were lost, as the replays say: counts and shares of the failing answers of an arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvpress_eval.diagnostic.attribution import chance_repairs
from kvpress_eval.diagnostic.finding import Verdict
from kvpress_eval.diagnostic.report.grid import Grid, Measured
from kvpress_eval.diagnostic.report.means import Mean, share
from kvpress_eval.records import FULL, Mode

#: what a lost answer can be, in the paper's repair order
LOST: tuple[Verdict, ...] = ("access", "value", "fit", "undecided")


@dataclass(frozen=True)
class VerdictRow:
    """One arm at one budget, None for all together; task: None for all. n: answers that the full cache has as well. lost: of these, those
    that the study calls failures. replayed: of these, those with a verdict. counts, shares: by verdict, percent of the replayed. stored: of
    the counted value verdicts, those that the exact values alone repair. by_chance: percent of the replayed that an
    exchange of as many tokens at random repairs. asked: whether the study has this arm's failures replayed."""

    mode: Mode
    budget: str | None
    arm: str
    task: str | None
    n: int
    lost: int
    replayed: int
    counts: dict[str, int]
    shares: dict[str, Mean]
    stored: int
    by_chance: Mean
    asked: bool


def verdict_rows(grid: Grid) -> list[VerdictRow]:
    """The host and every arm, at each budget and at all; and over all budgets by task."""
    found = []
    for arm in grid.arms:
        for scope in grid.scopes:
            each = list(grid.measured(arm, scope))
            if not each:
                continue
            found.append(_row(grid, arm, scope, None, each))
            if scope == grid.overall:
                for task in dict.fromkeys(one.place.task for one in each):
                    found.append(_row(grid, arm, scope, task, [one for one in each if one.place.task == task]))
    return found


def failing(grid: Grid, each: Sequence[Measured]) -> list[Measured]:
    """Answers that the full cache gives and the arm does not, by the study's own rule."""
    rule, full = grid.study.measure.failing, grid.answers[FULL, None]
    return [
        one
        for one in each
        if (of_full := full.get(one.place, {}).get(one.record.sample)) is not None
        and rule.fails(of_full.score, one.record.score)
    ]


def _row(grid: Grid, arm: str, scope: str | None, task: str | None, each: Sequence[Measured]) -> VerdictRow:
    full, asked = grid.answers[FULL, None], grid.study.measure.attribute
    replayed = [one for one in each if one.finding.verdict in LOST]
    clusters = [one.cluster for one in replayed]
    by_verdict = {name: [one.finding.verdict == name for one in replayed] for name in LOST}
    first = [next((replay.name for replay in one.finding.replays if replay.repaired), None) for one in replayed]
    chance = [chance_repairs(one.finding.replays) for one in replayed]
    return VerdictRow(
        mode=grid.mode,
        budget=scope,
        arm=arm,
        task=task,
        n=sum(one.record.sample in full.get(one.place, {}) for one in each),
        lost=len(failing(grid, each)),
        replayed=len(replayed),
        counts={name: sum(hits) for name, hits in by_verdict.items()},
        shares={name: share(hits, clusters) for name, hits in by_verdict.items()},
        stored=sum(name == "stored" for name in first),
        by_chance=share(chance, clusters),
        asked=asked is None or arm in asked,
    )
