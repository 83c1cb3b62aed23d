"""What a reader must know before the numbers of a diagnostic."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from kvpress_eval.diagnostic.report.grid import Grid
from kvpress_eval.diagnostic.report.head import shows_gap
from kvpress_eval.diagnostic.report.measures import MeasureRow
from kvpress_eval.diagnostic.report.runs import Run
from kvpress_eval.diagnostic.report.sign_rows import Signs
from kvpress_eval.diagnostic.report.stages import Step
from kvpress_eval.diagnostic.report.verdicts import VerdictRow
from kvpress_eval.diagnostic.report.words import budget_words, joined, with_ends
from kvpress_eval.records import FULL, FULL_REPEAT
from kvpress_eval.report.cells import FLOOR
from kvpress_eval.report.plan import differs_from_published, task_facts
from kvpress_eval.report.problems import FLAGS, Problem
from kvpress_eval.statistics.interval import MIN_CLUSTERS


def problems(
    runs: Sequence[Run],
    grids: Sequence[Grid],
    steps: Sequence[Step],
    measures: Sequence[MeasureRow],
    verdicts: Sequence[VerdictRow],
    signs: Sequence[Signs],
) -> list[Problem]:
    """Defects first, then what is missing, then what was said of the data."""
    return [
        *_bound(grids, measures),
        *_null(grids, steps, signs),
        *_missing(runs, grids),
        *_not_asked(grids, verdicts),
        *_floor(grids),
        *_few(steps, signs),
        *_left_out(signs),
        *_data(runs),
    ]


def _bound(grids: Sequence[Grid], measures: Sequence[MeasureRow]) -> Iterator[Problem]:
    overall = {grid.mode: grid.overall for grid in grids}
    broken = sum(row.bound_n - row.bound_holds for row in measures if row.budget == overall[row.mode])
    if broken:
        yield Problem(
            broken,
            "measurements violate the tail-K bound of Prop. 3, which cannot be: a defect, do not use these numbers",
        )


def _null(grids: Sequence[Grid], steps: Sequence[Step], signs: Sequence[Signs]) -> Iterator[Problem]:
    for grid, of_mode in zip(grids, signs, strict=True):
        for step in steps:
            if (step.mode, step.role) == (grid.mode, "null") and step.shown is not None:
                yield Problem(
                    None,
                    f"the null arm moves the score at {budget_words(step.budget)} ({with_ends(step.difference)}): ties at the host's "
                    "boundary decide answers, or this is the one case in twenty",
                )
        for row in of_mode.signs:
            if row.role == "null" and row.budget == grid.overall and shows_gap(row):
                yield Problem(None, "the null arm shows a cross-fitted gap: do not read those of other arms as effects")


def _missing(runs: Sequence[Run], grids: Sequence[Grid]) -> Iterator[Problem]:
    arms = [record for run in runs for record in run.records if record.arm not in (FULL, FULL_REPEAT)]
    with_finding = {(run.model, key) for run in runs for key in run.findings}
    names = set(grids[0].arms)
    unmeasured = sum(
        (run.model, record.key) not in with_finding
        for run in runs
        for record in run.records
        if record.arm not in (FULL, FULL_REPEAT)
    )
    foreign = sum(record.contract not in names for record in arms)
    if unmeasured:
        yield Problem(unmeasured, "records have no finding: their scores are counted, their stages are not known")
    if foreign:
        yield Problem(foreign, "records are of arms that the study does not name, and are not shown")
    for grid in grids:
        lacking: Counter[str] = Counter()
        for place, samples in grid.answers[FULL, None].items():
            for budget in grid.budgets:
                for arm in grid.arms:
                    lacking[arm] += len(samples.keys() - grid.answers.get((arm, budget), {}).get(place, {}).keys())
        named = [f"{arm} {n}" for arm, n in lacking.most_common() if n]
        if named:
            yield Problem(
                None,
                f"arms lack records of samples that the full cache answered, and are compared without these: {', '.join(named)}",
            )


def _not_asked(grids: Sequence[Grid], verdicts: Sequence[VerdictRow]) -> Iterator[Problem]:
    for grid in grids:
        rows = [
            row
            for row in verdicts
            if (row.mode, row.budget, row.task) == (grid.mode, grid.overall, None) and row.lost > row.replayed
        ]
        unasked = [row for row in rows if not row.asked]
        open_ = sum(row.lost - row.replayed for row in rows if row.asked)
        if unasked:
            yield Problem(
                sum(row.lost - row.replayed for row in unasked),
                f"lost answers of {joined([row.arm for row in unasked])} were not replayed: `measure.attribute` of the study leaves them out",
            )
        if open_:
            yield Problem(
                open_,
                "lost answers of arms that were to be replayed have no verdict: they have no finding, or were never cut",
            )


def _floor(grids: Sequence[Grid]) -> Iterator[Problem]:
    tasks: dict[tuple[str, str, int | None], list[float]] = defaultdict(list)
    for grid in grids:
        for place, samples in grid.answers[FULL, None].items():
            tasks[grid.mode, place.task, place.length] += [record.score for record in samples.values()]
    low = sorted({task for (_, task, _), scores in tasks.items() if sum(scores) <= FLOOR * len(scores)})
    if low:
        yield Problem(
            len(low),
            f"tasks are at the floor, the full cache scores {100 * FLOOR:g} points or less, so no arm can lose there: {', '.join(low)}",
        )


def _few(steps: Sequence[Step], signs: Sequence[Signs]) -> Iterator[Problem]:
    without = sum(step.difference.low is None for step in steps)
    if without:
        yield Problem(without, f"changes have no interval: a task has fewer than {MIN_CLUSTERS} clusters of samples")
    results = [row.result for each in signs for row in each.signs if row.result is not None]
    few = [result for result in results if result.cross_fitted.rate_gap.low is None]
    if few:
        yield Problem(
            len(few),
            f"sign evaluations have no interval of the gap: fewer than {MIN_CLUSTERS} tasks in one of its groups",
        )


def _left_out(signs: Sequence[Signs]) -> Iterator[Problem]:
    cells: dict[str, set[object]] = defaultdict(set)
    reasons: Counter[str] = Counter()
    for each in signs:
        for row in each.signs:
            for left in row.result.left_out if row.result is not None else ():
                cells[left.reason].add(left.key)
            if row.result is None:
                reasons[row.reason] += 1
        for leverage in each.leverage:
            if leverage.result is None:
                reasons[leverage.reason] += 1
        for way in each.trajectories:
            for left in way.result.left_out if way.result is not None else ():
                cells[f"trajectories: {left.reason}"].add(left.key)
            if way.result is None:
                reasons[way.reason] += 1
    for reason, keys in cells.items():
        yield Problem(len(keys), f"cells are left out of the statistics on signs: {reason}")
    for reason, n in reasons.items():
        yield Problem(n, f"statistics on signs are not there: {reason}")


def _data(runs: Sequence[Run]) -> Iterator[Problem]:
    tasks = dict.fromkeys((run.model, r.family, r.task, r.length) for run in runs for r in run.records)
    manifests = {run.model: run.manifest for run in runs}
    sentences: dict[str, None] = {}
    for model, family, task, length in tasks:
        published = differs_from_published(manifests[model], family, task, length)
        caveat = task_facts(manifests[model], task, length).get("caveat")
        sentences |= dict.fromkeys(one for one in (published, f"{task}: {caveat}" if caveat else None) if one)
    yield from (Problem(None, sentence) for sentence in sentences)
    unknown = {record.task for run in runs for record in run.records} - {t for run in runs for t in run.couplings}
    if unknown:
        yield Problem(len(unknown), "tasks have no coupling in the manifest, so phi is not known for them")
    flags = Counter(flag for run in runs for record in run.records for flag in record.flags)
    for flag, count in flags.most_common():
        yield Problem(count, FLAGS.get(flag, f'records carry the flag "{flag}"'))
