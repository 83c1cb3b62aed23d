"""From records with findings to a summary: everything that tables, JSON and page show.

    summary = summarize([(read_run(folder), manifest.read(folder)) for folder in folders])

Arms are compared only on samples that both have. Modes are never mixed; models are, where several runs are given, with the
answers of all models to one sample as one cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpress_eval.diagnostic.report.boundaries import ExchangeRow, UnitRow, exchange_rows, unit_rows
from kvpress_eval.diagnostic.report.failures import Failure, failures
from kvpress_eval.diagnostic.report.grid import Grid, make_grids
from kvpress_eval.diagnostic.report.head import head
from kvpress_eval.diagnostic.report.measures import MeasureRow, measure_rows
from kvpress_eval.diagnostic.report.problems import problems
from kvpress_eval.diagnostic.report.runs import Run, read
from kvpress_eval.diagnostic.report.sign_rows import Signs, sign_rows
from kvpress_eval.diagnostic.report.stages import Estimates, Level, Step, levels, steps
from kvpress_eval.diagnostic.report.verdicts import VerdictRow, verdict_rows
from kvpress_eval.diagnostic.report.words import plural
from kvpress_eval.diagnostic.sign_settings import SignSettings
from kvpress_eval.diagnostic.study import Study
from kvpress_eval.records import Mode, Record
from kvpress_eval.report.problems import Problem

SEED = 0


@dataclass(frozen=True)
class Part:
    """Everything of one mode; rows name their budget, None for all together. head: the findings in sentences."""

    grid: Grid
    head: list[str]
    levels: list[Level]
    steps: list[Step]
    measures: list[MeasureRow]
    verdicts: list[VerdictRow]
    exchanges: list[ExchangeRow]
    units: list[UnitRow]
    signs: Signs

    @property
    def mode(self) -> Mode:
        return self.grid.mode

    @property
    def size(self) -> str:
        """Tasks and answers behind a score at one budget, of the arm that has most."""
        largest = max((each for each in self.levels if each.budget in self.grid.budgets), key=lambda each: each.score.n)
        return f"{plural(largest.n_tasks, 'task')}, n = {largest.score.n:,} at each budget"


@dataclass(frozen=True)
class Summary:
    """parts: one for each mode. runs: what they are made of."""

    runs: tuple[Run, ...]
    parts: list[Part]
    failures: list[Failure]
    problems: list[Problem]
    settings: SignSettings

    @property
    def study(self) -> Study:
        return self.runs[0].study

    @property
    def n_records(self) -> int:
        return sum(len(run.records) for run in self.runs)

    @property
    def head(self) -> list[str]:
        """All sentences."""
        return [sentence for part in self.parts for sentence in part.head]


def summarize(
    runs: Sequence[tuple[Sequence[Record], Mapping[str, Any]]], *, settings: SignSettings | None = None
) -> Summary:
    """Summarize one run, or the runs of one study on several models. runs: records and manifest of each.

    Raises:
        InputError: there is no run, one is empty, is no run of a study or has records of another, or their studies differ.
    """
    settings = settings or SignSettings()
    found = read(runs)
    grids = make_grids(found)
    parts = [_part(grid, settings) for grid in grids]
    return Summary(
        runs=found,
        parts=parts,
        failures=failures(grids),
        problems=problems(
            found,
            grids,
            [step for part in parts for step in part.steps],
            [row for part in parts for row in part.measures],
            [row for part in parts for row in part.verdicts],
            [part.signs for part in parts],
        ),
        settings=settings,
    )


def _part(grid: Grid, settings: SignSettings) -> Part:
    estimates = Estimates(grid.mode, SEED)
    of_levels, of_steps = levels(grid, estimates), steps(grid, estimates, SEED)
    of_verdicts, of_signs = verdict_rows(grid), sign_rows(grid, settings, SEED)
    return Part(
        grid=grid,
        head=head(grid, of_levels, of_steps, of_verdicts, of_signs.signs),
        levels=of_levels,
        steps=of_steps,
        measures=measure_rows(grid),
        verdicts=of_verdicts,
        exchanges=exchange_rows(grid),
        units=unit_rows(grid),
        signs=of_signs,
    )
