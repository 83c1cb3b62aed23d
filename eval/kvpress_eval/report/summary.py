"""From records to a summary: everything that tables, JSON, CSV and page show.

    records = read_run(folder)
    summary = summarize(records, manifest)

Arms are compared only on samples that the full cache has as well; samples without a partner are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpress.errors import InputError
from kvpress_eval.records import FULL, FULL_REPEAT, Mode, Record
from kvpress_eval.report.cells import Cell
from kvpress_eval.report.depths import DepthGrid, depth_grids
from kvpress_eval.report.losses import Loss, worst_losses
from kvpress_eval.report.macro import SCOPES, Part, macro_rows
from kvpress_eval.report.plan import check_one_run, margins, n_samples, task_facts
from kvpress_eval.report.problems import Problem, problems
from kvpress_eval.report.rows import MacroRow, NoiseRow, Row
from kvpress_eval.report.verdicts import judged_macro, judged_rows

SEED = 0


@dataclass(frozen=True)
class Summary:
    """Rows are sorted by family, task, length and mode; in each group the full cache first, then by difference."""

    rows: list[Row]
    macro: list[MacroRow]
    noise: list[NoiseRow]
    depths: list[DepthGrid]
    losses: list[Loss]
    problems: list[Problem]
    caveats: dict[str, str]
    margins: dict[str, float]
    n_records: int
    manifest: dict[str, Any]


def summarize(records: Sequence[Record], manifest: Mapping[str, Any]) -> Summary:
    """Summarize a run. manifest: "margins" are read from it, and what was planned; the rest is only shown.

    Raises:
        InputError: there are no records, none of the full cache, records of another run, a sample was asked with two
            prompts, or the manifest's margins and numbers of samples are none.
    """
    if not records:
        raise InputError("the run holds no records yet; run or resume it first")
    check_one_run(records, manifest)
    # sums of floats and resamples depend on the order, and a resumed run has another one
    records = sorted(
        records, key=lambda record: (record.task, record.length or 0, record.sample, record.mode, record.arm)
    )
    cells, lonely = _cells(records, manifest)
    if not cells:
        raise InputError(f"the run holds no records of the arm '{FULL}', so there is nothing to compare with")
    allowed = margins(manifest)
    parts: dict[tuple[str, int | None, Mode, str], Part] = {}
    noise = []
    for cell in cells:
        repeats = cell.repeats()
        floor = None if repeats is None else cell.noise(repeats)
        noise += [floor] if floor else []
        for arm in cell.arms:
            pairs = cell.pairs(arm)
            if arm != FULL_REPEAT and len(pairs):
                row = cell.row(arm, pairs, floor, allowed["task"])
                parts[cell.task, cell.length, cell.mode, arm] = Part(row, pairs, repeats)
    unjudged = []
    for group in _groups(cells):
        of_group = {
            (cell.task, arm): parts[cell.task, cell.length, cell.mode, arm]
            for cell in group
            for arm in cell.arms
            if (cell.task, cell.length, cell.mode, arm) in parts
        }
        unjudged += macro_rows(group, of_group, allowed["macro"])
    rows, macro = judged_rows([part.row for part in parts.values()]), judged_macro(unjudged)
    return Summary(
        rows=sorted(rows, key=lambda row: (row.family, row.task, row.length or 0, row.mode, *_rank(row))),
        macro=sorted(
            macro,
            key=lambda row: (row.family, row.length or 0, row.mode, SCOPES.index(row.scope), *_rank(row)),
        ),
        noise=noise,
        depths=depth_grids(records),
        losses=worst_losses([cell.arms for cell in cells]),
        problems=problems(rows, macro, records, lonely, manifest),
        caveats=_caveats(cells, manifest),
        margins=allowed,
        n_records=len(records),
        manifest=dict(manifest),
    )


def _cells(records: Iterable[Record], manifest: Mapping[str, Any]) -> tuple[list[Cell], int]:
    """Cells in the order of their first records, and how many records lie in cells without the full cache."""
    grouped: dict[tuple[str, str, int | None, Mode], dict[str, list[Record]]] = {}
    for record in records:
        arms = grouped.setdefault((record.family, record.task, record.length, record.mode), {})
        arms.setdefault(record.arm, []).append(record)
    cells, lonely = [], 0
    for (family, task, length, mode), arms in grouped.items():
        if FULL in arms:
            planned = n_samples(manifest, task, length) or 0
            cells.append(Cell(family, task, length, mode, arms, _in_macro(task), planned, SEED))
        else:
            lonely += sum(map(len, arms.values()))
    return cells, lonely


def _groups(cells: Iterable[Cell]) -> list[list[Cell]]:
    groups: dict[tuple[str, int | None, Mode], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.family, cell.length, cell.mode), []).append(cell)
    return list(groups.values())


def _caveats(cells: Iterable[Cell], manifest: Mapping[str, Any]) -> dict[str, str]:
    """What must be printed with the scores of a task, where there is something."""
    found = {cell.task: task_facts(manifest, cell.task, cell.length).get("caveat") for cell in cells}
    return {task: str(caveat) for task, caveat in found.items() if caveat}


def _in_macro(task: str) -> bool:
    from kvpress_eval.tasks import TASKS

    return TASKS[task].in_macro if task in TASKS else True


def _rank(row: Row | MacroRow) -> tuple[bool, float, str]:
    return row.arm != FULL, -(row.delta or 0.0), row.arm
