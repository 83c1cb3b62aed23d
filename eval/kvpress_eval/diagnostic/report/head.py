"""The findings in plain sentences, by a fixed grammar: nothing is claimed that its interval does not show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvpress_eval.diagnostic.report.grid import STAGE_ORDER, Grid
from kvpress_eval.diagnostic.report.sign_rows import SignRow
from kvpress_eval.diagnostic.report.stages import Level, Step
from kvpress_eval.diagnostic.report.verdicts import LOST, VerdictRow
from kvpress_eval.diagnostic.report.words import (
    budget_words,
    ends,
    holds_zero,
    joined,
    joined_ends,
    level_ends,
    plural,
    with_ends,
)
from kvpress_eval.diagnostic.study import NULL
from kvpress_eval.records import FULL
from kvpress_eval.report.text import DASH, MODES, number, signed

#: changes of one stage that are named; the ladder has all
NAMED = 3


def head(
    grid: Grid, levels: Sequence[Level], steps: Sequence[Step], verdicts: Sequence[VerdictRow], signs: Sequence[SignRow]
) -> list[str]:
    """Sentences on one mode, in the order in which they are read: what was compared, losses and their stages, swaps, signs, calibration."""
    return [
        _compared(grid),
        *(_loss(grid, budget, levels, verdicts) for budget in grid.budgets),
        _changes(grid, steps),
        *_signs(grid, signs),
        *_calibration(grid, steps, signs),
    ]


def _compared(grid: Grid) -> str:
    full = grid.answers[FULL, None]
    tasks = {(place.task, place.length) for place in full}
    samples = {(place.task, place.length, sample) for place, records in full.items() for sample in records}
    models = joined([run.model for run in grid.runs])
    budgets = joined([budget_words(budget) for budget in grid.budgets])
    return (
        f"{models}, {MODES[grid.mode]}: the host {grid.host} and {plural(len(grid.study.comparisons), 'arm')} at {budgets} "
        f"against the full cache, on {plural(len(tasks), 'task')} with {plural(len(samples), 'sample')}."
    )


def _loss(grid: Grid, budget: str, levels: Sequence[Level], verdicts: Sequence[VerdictRow]) -> str:
    level = next((each for each in levels if (each.budget, each.arm) == (budget, grid.host)), None)
    at = f"At {budget_words(budget)}"
    if level is None or level.to_full is None:
        return f"{at} the host {grid.host} was not run."
    change, value = level.to_full, level.to_full.value or 0.0
    of = f"of the full cache's {number((level.score.value or 0.0) - value)}"
    if holds_zero(change) is None:
        said = f"{at} {grid.host} is {signed(value)} points from the full cache, with too few clusters for an interval."
    elif holds_zero(change):
        said = f"{at} no difference of {grid.host} {of} points is shown: {with_ends(change)}."
    else:
        verb = "loses" if value < 0 else "gains"
        low, high = sorted([abs(change.low or 0.0), abs(change.high or 0.0)])
        said = f"{at} {grid.host} {verb} {number(abs(value))} points [{number(low)}, {number(high)}] {of}."
    row = next((each for each in verdicts if (each.budget, each.arm, each.task) == (budget, grid.host, None)), None)
    return said if row is None else f"{said} {_stages(row)}"


def _stages(row: VerdictRow) -> str:
    if not row.lost:
        return "It lost no answer of the full cache."
    if not row.replayed:
        return f"Its {plural(row.lost, 'lost answer')} {'was' if row.lost == 1 else 'were'} not replayed."
    of = f"{row.replayed} replayed of {row.lost}" if row.replayed < row.lost else f"{row.replayed}"
    told = {name: f"{number(row.shares[name].value, 0)} % {level_ends(row.shares[name], 0)}" for name in LOST}
    stages = [f"{told[name]} in {name}" for name in LOST if name != "undecided" and row.counts[name]]
    is_open = f"{told['undecided']} are undecided" if row.counts["undecided"] else ""
    lost = f"{joined(stages)}".replace(" in ", " were lost in ", 1) if stages else ""
    return f"Of {of} lost answers {'; '.join(part for part in (lost, is_open) if part)}."


def _changes(grid: Grid, steps: Sequence[Step]) -> str:
    of_all = [step for step in steps if step.budget == grid.overall and step.role != "null"]
    parts = []
    for stage in STAGE_ORDER:
        tested = [step for step in of_all if step.stage == stage]
        shown = sorted((step for step in tested if step.shown), key=lambda step: -abs(step.difference.value or 0.0))
        names = [
            f"{step.arm}{' (transfer)' if step.label == 'transfer' else ''} {with_ends(step.difference)} against {step.base}"
            for step in shown[:NAMED]
        ]
        more = [f"{len(shown) - NAMED} more"] if len(shown) > NAMED else []
        if tested:
            parts.append(f"{stage}: {joined([*names, *more]) if names else f'none of {len(tested)} shown'}")
    return (
        f"Changes of the score that are shown over {budget_words(grid.overall)}, in points (Holm over "
        f"{plural(sum(step.p is not None for step in of_all), 'arm')}): {'; '.join(parts) or 'none'}."
    )


def main_arm(grid: Grid) -> str | None:
    """The arm that the sentence on signs is about: MII where it is there, else the first ranking, else the first arm of the host."""
    of_host = [each for each in grid.study.comparisons if each.base == grid.host and each.role == "arm"]
    rankings = [each for each in of_host if each.slots == ("ranking",)]
    mii = [each for each in rankings if grid.study.contract(each.arm).ranking.kind == "mii"]
    return next((each.arm for each in (*mii, *rankings, *of_host)), None)


def shows_gap(row: SignRow) -> bool | None:
    """Whether the cross-fitted gap is shown: its interval lies off 0 and off what the run shows without effect. None: no interval."""
    if row.result is None:
        return None
    gap, artefact = row.result.cross_fitted.rate_gap, row.result.artefact
    if gap.low is None or gap.high is None:
        return None
    expected = artefact.cross_fitted["rate_gap"].expected if artefact is not None else None
    low, high = sorted([0.0, expected or 0.0])
    return gap.low > high or gap.high < low


def _signs(grid: Grid, signs: Sequence[SignRow]) -> Iterator[str]:
    arm = main_arm(grid)
    row = next((each for each in signs if (each.arm, each.budget) == (arm, grid.overall)), None)
    if row is None:
        return
    asked = f"Does the sign of the margin predict that of {grid.name(arm or '')}'s lift?"
    if row.result is None:
        yield f"{asked} Not known: {row.reason}."
        return
    gap, raw = row.result.cross_fitted.rate_gap, row.result.raw.rate_gap
    if gap.value is None:
        yield f"{asked} Not known: all {row.result.cross_fitted.n_cells:g} cells are on one side of the margin."
        return
    way = "shown" if gap.value > 0 else "shown, against the prediction"
    said = {True: way, False: "not shown", None: f"no interval with {plural(gap.n_tasks, 'task')}"}[shows_gap(row)]
    interval = "" if ends(gap, 0) == DASH else f" {ends(gap, 0)}"
    artefact = row.result.artefact
    expected = artefact.raw["rate_gap"].expected if artefact is not None else None
    without = "" if expected is None else f", {_expected(expected, raw.value)} without any effect"
    yield f"{asked} Cross-fitted gap {signed(gap.value, 0)} points{interval}: {said}; the raw split shows {signed(raw.value, 0)}{without}."


def _expected(expected: float, raw: float | None) -> str:
    """A part of the raw gap, unless it is more than all of it."""
    if raw is not None and 0 <= expected <= raw:
        return f"of which {signed(expected, 0)} are expected"
    return f"where {signed(expected, 0)} are expected"


def _calibration(grid: Grid, steps: Sequence[Step], signs: Sequence[SignRow]) -> Iterator[str]:
    step = next((each for each in steps if (each.role, each.budget) == ("null", grid.overall)), None)
    row = next((each for each in signs if (each.role, each.budget) == ("null", grid.overall)), None)
    if step is None:
        return
    is_right = step.shown is None and not (row is not None and shows_gap(row))
    gap = None if row is None or row.result is None else row.result.cross_fitted.rate_gap
    told = "" if gap is None or gap.value is None else f" and has a cross-fitted gap of {joined_ends(gap, 0)}"
    yield (
        f"Calibration: the {NULL} arm, which does nothing, moves the score by {with_ends(step.difference)} points{told}: "
        f"{'nothing is shown, as it should be' if is_right else 'outside of its expectation, so read nothing finer than this'}."
    )
