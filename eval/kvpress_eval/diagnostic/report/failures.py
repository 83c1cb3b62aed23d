"""Failing samples worth explaining: lost answers with a verdict, spread over verdicts, arms and tasks."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvpress_eval.diagnostic.finding import Verdict
from kvpress_eval.diagnostic.report.grid import Grid, Measured
from kvpress_eval.diagnostic.report.verdicts import LOST
from kvpress_eval.diagnostic.words import replay_rows, verdict_sentence
from kvpress_eval.records import FULL, Mode
from kvpress_eval.report.losses import shorten

#: samples that are shown
SHOWN = 12


@dataclass(frozen=True)
class Failure:
    """One lost answer. scores in points; texts are cut; replays: as `words.replay_rows`; command: how to see the sample itself."""

    model: str
    mode: Mode
    task: str
    length: int | None
    sample: str
    arm: str
    verdict: Verdict
    sentence: str
    full_score: float
    score: float
    question: str
    answers: tuple[str, ...]
    full_prediction: str
    prediction: str
    replays: tuple[tuple[str, str, str, str, str], ...]
    command: str


def failures(grids: Sequence[Grid]) -> list[Failure]:
    """Up to SHOWN failures: one of each verdict in turn, each time of the arm, task and sample shown least so far; the host first."""
    waiting: dict[str, list[tuple[Grid, Measured]]] = {verdict: [] for verdict in LOST}
    for grid in grids:
        for arm in grid.arms:
            for one in grid.measured(arm, None):
                if one.finding.verdict in LOST and one.record.sample in grid.answers[FULL, None].get(one.place, {}):
                    waiting[one.finding.verdict].append((grid, one))
    chosen: list[Failure] = []
    shown: Counter[object] = Counter()
    while len(chosen) < SHOWN and any(waiting.values()):
        for verdict in LOST:
            if waiting[verdict] and len(chosen) < SHOWN:
                grid, one = min(waiting[verdict], key=lambda found: _rank(found[1], shown))
                waiting[verdict].remove((grid, one))
                shown.update(_names(one))
                chosen.append(_failure(grid, one))
    return sorted(chosen, key=lambda failure: LOST.index(failure.verdict))


def _names(one: Measured) -> list[object]:
    record = one.record
    return [("arm", record.contract), ("task", record.task), ("sample", record.task, record.sample)]


def _rank(one: Measured, shown: Counter[object]) -> int:
    """Ties are broken by the order of the study, in which the host is first."""
    arm, task, sample = (shown[name] for name in _names(one))
    return arm + task + 3 * sample


def _failure(grid: Grid, one: Measured) -> Failure:
    record, finding = one.record, one.finding
    full = grid.answers[FULL, None][one.place][record.sample]
    assert finding.verdict is not None
    sample, arm = shlex.quote(f"{record.task}/{record.sample}"), shlex.quote(record.arm)
    return Failure(
        model=one.place.model,
        mode=record.mode,
        task=record.task,
        length=record.length,
        sample=record.sample,
        arm=record.arm,
        verdict=finding.verdict,
        sentence=verdict_sentence(record.arm, finding),
        full_score=100 * full.score,
        score=100 * record.score,
        question=shorten(record.question),
        answers=tuple(shorten(answer, 120) for answer in record.answers[:12]),
        full_prediction=shorten(full.prediction),
        prediction=shorten(record.prediction),
        replays=tuple(replay_rows(finding.replays)),
        command=shorten(f"kvpress diagnose explain RUN {sample} --arm {arm}"),
    )
