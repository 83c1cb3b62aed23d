"""The page: one HTML file that needs nothing else and asks nobody for anything.

Texts of a run (predictions, names, the manifest) are untrusted: the template escapes all of them, and the page's own policy
allows no script but the one whose hash it names, no image, no font and no connection.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvpress_eval.records import FULL, Mode
from kvpress_eval.report import text
from kvpress_eval.report.costs import CostRow, cost_rows
from kvpress_eval.report.noise import noise_totals
from kvpress_eval.report.page import render
from kvpress_eval.report.plots import forest, heatmap, score_by_bytes
from kvpress_eval.report.rows import MacroRow, Row
from kvpress_eval.report.summary import Summary
from kvpress_eval.statistics.noise import MIN_REPEATS


@dataclass(frozen=True)
class Block:
    """One family, length and mode. informative: macro rows without floor and ceiling tasks, empty if there are none such.

    excluded: the floor and ceiling tasks. reach: lowest and highest point of the drawn intervals. retention: for each task,
    the rows of `arms` in their order, None where there is no row.
    """

    family: str
    length: int | None
    mode: Mode
    macro: list[MacroRow]
    informative: list[MacroRow]
    excluded: list[str]
    reach: tuple[float, float]
    rows: list[Row]
    costs: list[CostRow]
    score_plot: str
    forest_plot: str
    heatmaps: list[tuple[str, str]]

    @property
    def name(self) -> str:
        return f"{self.family}, {text.length_name(self.length)}, {text.MODES[self.mode]}"

    @property
    def arms(self) -> list[str]:
        return [row.arm for row in self.macro if row.arm != FULL]

    @property
    def retention(self) -> list[tuple[str, list[Row | None]]]:
        found = {(row.task, row.arm): row for row in self.rows}
        tasks = dict.fromkeys(row.task for row in self.rows)
        return [(task, [found.get((task, arm)) for arm in self.arms]) for task in tasks]

    @property
    def verdicts(self) -> list[tuple[str, list[str]]]:
        """Arms by verdict, for the sentence at the top."""
        kinds = ("no loss", "loss", "undecided")
        return [(kind, [row.arm for row in self.macro if row.verdict == kind]) for kind in kinds]


def to_html(summary: Summary) -> str:
    """The whole page."""
    return render(
        "kvpress_eval.report",
        {
            "number": text.number,
            "signed": text.signed,
            "probability": text.probability,
            "size": text.size,
            "interval": text.interval,
            "length_name": text.length_name,
        },
        summary=summary,
        blocks=blocks(summary),
        facts=facts(summary),
        title=_of(summary.manifest.get("model"), "source") or "A model",
        noise_totals=noise_totals(summary.noise),
        modes=text.MODES,
        FULL=FULL,
        verdict_words=text.verdict_words,
        count=text.count,
        min_repeats=MIN_REPEATS,
        manifest=json.dumps(summary.manifest, indent=2, ensure_ascii=False),
    )


def blocks(summary: Summary) -> list[Block]:
    """The parts of the page that repeat for each family, length and mode, with their plots."""
    found = []
    costs = cost_rows(summary.rows)
    for key in dict.fromkeys((row.family, row.length, row.mode) for row in summary.rows):
        rows = [row for row in summary.rows if (row.family, row.length, row.mode) == key]
        of_key = [row for row in summary.macro if (row.family, row.length, row.mode) == key]
        macro = [row for row in of_key if row.scope == "all"]
        informative = [row for row in of_key if row.scope == "informative"]
        excluded = sorted({task for row in of_key if row.scope == "floor or ceiling" for task in row.tasks})
        block = Block(
            *key,
            macro=macro,
            informative=informative if excluded else [],
            excluded=excluded,
            reach=_reach(macro),
            rows=rows,
            costs=_ordered(
                [row for row in costs if (row.family, row.length, row.mode) == key], [row.arm for row in macro]
            ),
            score_plot="",
            forest_plot="",
            heatmaps=_heatmaps(summary, key),
        )
        found.append(_with_plots(block, 100 * summary.margins["task"]))
    return found


def facts(summary: Summary) -> list[tuple[str, str]]:
    """What ran, in a few words; a manifest of another shape leaves some of them out."""
    manifest, rows = summary.manifest, summary.rows
    arms = dict.fromkeys(row.arm for row in rows if row.arm != FULL)
    software = manifest.get("software")
    latest: Any = software[-1] if isinstance(software, list) and software else {}
    items = sorted({row.n for row in rows})
    found = [
        ("model", _of(manifest.get("model"), "source")),
        ("precision", _of(manifest.get("model"), "dtype")),
        ("tasks", str(len({row.task for row in rows}))),
        ("items a task", text.count(items[0], items[-1])),
        ("arms", str(len(arms))),
        ("budgets", ", ".join(dict.fromkeys(arm.rpartition("@")[2] for arm in arms if "@" in arm))),
        ("modes", ", ".join(text.MODES[mode] for mode in dict.fromkeys(row.mode for row in rows))),
        ("lengths", ", ".join(dict.fromkeys(text.length_name(row.length) for row in rows))),
        ("device", _of(latest, "device")),
        ("begun", str(manifest.get("created", "")).replace("T", " ").removesuffix("+00:00")),
    ]
    return [(name, value) for name, value in found if value]


def _of(part: Any, name: str) -> str:
    return str(part.get(name) or "") if isinstance(part, dict) else ""


def _reach(rows: Sequence[MacroRow]) -> tuple[float, float]:
    ends = [end for row in rows for end in (row.delta, row.ci_low, row.ci_high) if end is not None]
    low, high = min([-5.0, *ends]), max([5.0, *ends])
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _with_plots(block: Block, margin: float) -> Block:
    if len(block.macro) < 2:  # the full cache alone, or no task that is averaged
        return block
    block = replace(block, score_plot=score_by_bytes(block.macro, f"Macro score by measured bytes: {block.name}"))
    if len({row.task for row in block.rows}) == 1:  # its one difference is the macro row's
        return block
    return replace(block, forest_plot=forest(block.rows, block.macro, margin, f"Difference of each task: {block.name}"))


def _heatmaps(summary: Summary, key: tuple[str, int | None, Mode]) -> list[tuple[str, str]]:
    family, length, mode = key
    lengths = [row.length for row in summary.rows if row.family == family and row.mode == mode]
    if lengths[0] != length:  # a heatmap shows all lengths; it stands with the first
        return []
    grids = [grid for grid in summary.depths if (grid.family, grid.mode) == (family, mode)]
    order = [row.arm for row in summary.macro if (row.family, row.length, row.mode, row.scope) == (*key, "all")]
    tasks = dict.fromkeys(grid.task for grid in grids)
    return [
        (task, heatmap(_ordered([g for g in grids if g.task == task], order), f"Score by depth: {task}, {mode}"))
        for task in tasks
    ]


def _ordered(grids: list[Any], order: list[str]) -> list[Any]:
    return sorted(grids, key=lambda grid: order.index(grid.arm) if grid.arm in order else len(order))
