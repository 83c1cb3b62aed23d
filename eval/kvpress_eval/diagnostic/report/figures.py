"""All figures of one mode, as SVG for the page; empty where there is nothing to draw."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvpress_eval.diagnostic.finding import Stage
from kvpress_eval.diagnostic.report import plots
from kvpress_eval.diagnostic.report.grid import STAGE_ORDER
from kvpress_eval.diagnostic.report.means import Mean
from kvpress_eval.diagnostic.report.plots.layers import MAX_ARMS
from kvpress_eval.diagnostic.report.sign_rows import CellRow, CouplingRow
from kvpress_eval.diagnostic.report.stages import rungs, stage_levels
from kvpress_eval.diagnostic.report.summary import Part
from kvpress_eval.diagnostic.report.words import budget_words
from kvpress_eval.diagnostic.sign_settings import SignSettings
from kvpress_eval.diagnostic.words import STAGES
from kvpress_eval.records import FULL
from kvpress_eval.report.text import MODES

Row = TypeVar("Row", CellRow, CouplingRow)


@dataclass(frozen=True)
class Figures:
    """ladders: by stage. The others are one figure each."""

    verdicts: str
    ladders: dict[str, str]
    margins: str
    trajectories: str
    layers: str
    coupling: str


def figures(part: Part, settings: SignSettings) -> Figures:
    """Everything that is drawn of one mode."""
    return Figures(
        verdicts=_sized(_verdicts(part)),
        ladders={stage: _sized(svg) for stage in STAGE_ORDER if (svg := _ladder(part, stage))},
        margins=_sized(_margins(part)),
        trajectories=_sized(_trajectories(part)),
        layers=_sized(_layers(part)),
        coupling=_sized(_coupling(part, settings.low_coupling)),
    )


def _sized(svg: str) -> str:
    """At its own size, so that its letters stay readable on a phone, where its box scrolls."""
    return re.sub(r'style="max-width: (\d+)px"', r'style="width: \1px"', svg, count=1)


def _names(part: Part) -> dict[str, str]:
    return {arm: part.grid.name(arm) for arm in part.grid.arms} | {FULL: "full cache"}


def _label(part: Part, what: str) -> str:
    return f"{what}, {MODES[part.mode]}"


def _verdicts(part: Part) -> str:
    rows = [row for row in part.verdicts if row.task is None]
    by_budget = {budget_words(budget): [row for row in rows if row.budget == budget] for budget in part.grid.budgets}
    return plots.verdicts(by_budget, _names(part), _label(part, "Lost answers by stage")) if rows else ""


def _ladder(part: Part, stage: Stage) -> str:
    found = part.grid.study.comparisons
    names = [*rungs(found, part.grid.host, stage), FULL]
    by_budget = {
        budget_words(budget): list(stage_levels(part.levels, names, part.mode, budget)) for budget in part.grid.budgets
    }
    if len(names) < 3 or not any(by_budget.values()):  # the host and the full cache alone are no ladder
        return ""
    transfers = [each.arm for each in found if not each.is_diagnostic]
    label = _label(part, f"Ladder of stage {STAGES[stage]}")
    return plots.ladder(by_budget, _names(part), part.grid.host, transfers, label)


def _margins(part: Part) -> str:
    by_arm = {part.grid.name(arm): rows for arm, rows in _by_arm(part.signs.cells)}
    return plots.margins(by_arm, part.grid.budgets, _label(part, "Margins and lifts")) if by_arm else ""


def _trajectories(part: Part) -> str:
    by_arm = {part.grid.name(row.arm): row.result for row in part.signs.trajectories if row.result is not None}
    return plots.trajectories(by_arm, _label(part, "Trajectories over budgets")) if by_arm else ""


def _coupling(part: Part, threshold: float) -> str:
    known = [row for row in part.signs.couplings if row.phi is not None]
    by_arm = {part.grid.name(arm): rows for arm, rows in _by_arm(known)}
    return plots.coupling(by_arm, threshold, _label(part, "Coupling and lift")) if by_arm else ""


def _layers(part: Part) -> str:
    """The host, the oracle, and the first arms of the study that there are colours for, one of each stage in turn."""
    arms = _drawn(part)
    by_panel: dict[str, dict[str, Sequence[Mean]]] = {}
    for run in part.grid.runs:
        for budget in part.grid.budgets:
            name = budget_words(budget) if len(part.grid.runs) == 1 else f"{budget_words(budget)}, {run.model}"
            rows = {row.arm: row for row in part.measures if row.budget == budget}
            curves = {
                arm: rows[arm].by_layer[run.model] for arm in arms if arm in rows and rows[arm].by_layer[run.model]
            }
            by_panel[name] = {part.grid.name(arm): curve for arm, curve in curves.items()}
    return plots.layers(by_panel, _label(part, "Output change by layer")) if any(by_panel.values()) else ""


def _drawn(part: Part) -> list[str]:
    found = part.grid.study.comparisons
    waiting = [[each.arm for each in found if each.stage == stage and each.role == "arm"] for stage in STAGE_ORDER]
    turns = max(map(len, waiting), default=0)
    others = [arms[turn] for turn in range(turns) for arms in waiting if turn < len(arms)]
    oracle = [each.arm for each in found if each.role == "oracle"]
    return [part.grid.host, *oracle, *others][:MAX_ARMS]


def _by_arm(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.arm, []).append(row)
    return list(found.items())
