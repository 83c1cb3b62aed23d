"""From records to a summary: everything that tables, JSON, CSV and page show.

    records = read_run(folder)
    summary = summarize(records, manifest)

Arms are compared only on samples that the full cache has as well; samples without a partner are counted. p values of rows
are adjusted by Benjamini-Hochberg over every row with a test (a screen: where to look), those of macro rows by Holm within
one family, length, mode and scope (claims that are read together).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from kvpress.errors import InputError
from kvpress_eval.records import FULL, FULL_REPEAT, Mode, Record
from kvpress_eval.report.cells import Cell
from kvpress_eval.report.depths import DepthGrid, depth_grids
from kvpress_eval.report.losses import Loss, worst_losses
from kvpress_eval.report.macro import SCOPES, Part, macro_rows
from kvpress_eval.report.rows import MacroRow, NoiseRow, Row
from kvpress_eval.statistics import benjamini_hochberg, holm, verdict

AnyRow = TypeVar("AnyRow", Row, MacroRow)
MARGINS = {"task": 0.03, "macro": 0.01}
SEED = 0
#: what the runner's flags mean; those without a sentence are counted from their own fields
_FLAGS = {
    "truncated": "",
    "evidence_cut": "",
    "stopped_by_length": "answers were stopped by the length limit of their benchmark",
    "empty_answer": "answers are empty",
}


@dataclass(frozen=True)
class Problem:
    """Something that a reader must know before the numbers: how often, and a sentence."""

    count: int
    sentence: str


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
        InputError: there are no records, none of the full cache, or a sample was asked with two prompts.
    """
    if not records:
        raise InputError("the run holds no records yet; run or resume it first")
    # sums of floats and resamples depend on the order, and a resumed run has another one
    records = sorted(
        records, key=lambda record: (record.task, record.length or 0, record.sample, record.mode, record.arm)
    )
    cells, lonely = _cells(records, manifest)
    if not cells:
        raise InputError(f"the run holds no records of the arm '{FULL}', so there is nothing to compare with")
    margins = {**MARGINS, **cast(Mapping[str, float], manifest.get("margins", {}))}
    parts: dict[tuple[str, int | None, Mode, str], Part] = {}
    noise = []
    for cell in cells:
        floor = cell.noise()
        noise += [floor] if floor else []
        for arm in cell.arms:
            pairs = cell.pairs(arm)
            if arm != FULL_REPEAT and len(pairs):
                parts[cell.task, cell.length, cell.mode, arm] = Part(cell.row(arm, pairs, floor), pairs, floor)
    macro = []
    for group in _groups(cells):
        of_group = {
            (cell.task, arm): parts[cell.task, cell.length, cell.mode, arm]
            for cell in group
            for arm in cell.arms
            if (cell.task, cell.length, cell.mode, arm) in parts
        }
        macro += macro_rows(group, of_group)
    rows = _judged_rows([part.row for part in parts.values()], margins["task"])
    return Summary(
        rows=sorted(rows, key=lambda row: (row.family, row.task, row.length or 0, row.mode, *_rank(row))),
        macro=sorted(
            _judged_macro(macro, margins["macro"]),
            key=lambda row: (row.family, row.length or 0, row.mode, SCOPES.index(row.scope), *_rank(row)),
        ),
        noise=noise,
        depths=depth_grids(records),
        losses=worst_losses([cell.arms for cell in cells]),
        problems=_problems(rows, records, lonely),
        caveats=_caveats(cells, manifest),
        margins=margins,
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
            planned = int(task_facts(manifest, task, length).get("n", 0))
            cells.append(Cell(family, task, length, mode, arms, _in_macro(task), planned, SEED))
        else:
            lonely += sum(map(len, arms.values()))
    return cells, lonely


def _groups(cells: Iterable[Cell]) -> list[list[Cell]]:
    groups: dict[tuple[str, int | None, Mode], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.family, cell.length, cell.mode), []).append(cell)
    return list(groups.values())


def task_facts(manifest: Mapping[str, Any], task: str, length: int | None) -> Mapping[str, Any]:
    """What the manifest says of a task at a length: "n" samples, and a "caveat". Empty where it says nothing."""
    entries = manifest.get("tasks")
    found = entries.get(task if length is None else f"{task}@{length}") if isinstance(entries, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _caveats(cells: Iterable[Cell], manifest: Mapping[str, Any]) -> dict[str, str]:
    """What must be printed with the scores of a task, where there is something."""
    found = {cell.task: task_facts(manifest, cell.task, cell.length).get("caveat") for cell in cells}
    return {task: str(caveat) for task, caveat in found.items() if caveat}


def _in_macro(task: str) -> bool:
    from kvpress_eval.tasks import TASKS

    return TASKS[task].in_macro if task in TASKS else True


def _judged_rows(rows: Sequence[Row], margin: float) -> list[Row]:
    tested = [row for row in rows if row.p is not None]
    adjusted = dict(zip(map(id, tested), benjamini_hochberg([row.p or 0.0 for row in tested]), strict=True))
    return [_judged(row, adjusted.get(id(row)), margin) for row in rows]


def _judged_macro(rows: Sequence[MacroRow], margin: float) -> list[MacroRow]:
    """One table of macro rows is one family of hypotheses: the claims that are read together."""
    tables: dict[tuple[object, ...], list[MacroRow]] = {}
    for row in rows:
        tables.setdefault((row.family, row.length, row.mode, row.scope), []).append(row)
    judged = []
    for table in tables.values():
        tested = [row for row in table if row.p is not None]
        adjusted = dict(zip(map(id, tested), holm([row.p or 0.0 for row in tested]), strict=True))
        judged += [_judged(row, adjusted.get(id(row)), margin) for row in table]
    return judged


def _judged(row: AnyRow, p_adjusted: float | None, margin: float) -> AnyRow:
    if row.delta is None:
        return row
    lower, upper = (None if end is None else end / 100 for end in (row.lower_bound, row.ci_high))
    return replace(row, p_adjusted=p_adjusted, verdict=verdict(row.delta / 100, lower, upper, p_adjusted, margin))


def _rank(row: Row | MacroRow) -> tuple[bool, float, str]:
    return row.arm != FULL, -(row.delta or 0.0), row.arm


def _problems(rows: Sequence[Row], records: Sequence[Record], lonely: int) -> list[Problem]:
    n_flags = Counter(flag for record in records for flag in record.flags)
    no_interval = sum(row.ci_low is None and row.delta is not None for row in rows)
    lost_evidence = sum(record.evidence_left is not None and record.evidence_left < 1 for record in records)
    counts = [
        (
            sum(row.missing for row in rows),
            "samples of the full cache have no partner under an arm and enter no comparison",
        ),
        (
            sum(row.extra for row in rows),
            "samples of an arm have no partner with the full cache and enter no comparison",
        ),
        (lonely, "records belong to a task and mode without the full cache and are not shown"),
        (sum(row.incomplete for row in rows), "rows have fewer samples than planned and are marked incomplete"),
        (sum(record.n_cut > 0 for record in records), "records lost tokens to middle truncation"),
        (lost_evidence, "records lost evidence before the model saw it, so no cache could have answered"),
        (no_interval, "rows have fewer than five clusters and no interval"),
        *(
            (n, _FLAGS.get(flag, f'records carry the flag "{flag}"'))
            for flag, n in n_flags.most_common()
            if _FLAGS.get(flag, flag)
        ),
    ]
    return [Problem(count, sentence) for count, sentence in counts if count]
