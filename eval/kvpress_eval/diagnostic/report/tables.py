"""Tables for the terminal: the findings, the stage ladder, verdicts and signs; with details everything that was measured."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvpress_eval.diagnostic.report.stages import Step
from kvpress_eval.diagnostic.report.summary import Part, Summary
from kvpress_eval.diagnostic.report.table_details import detail_tables
from kvpress_eval.diagnostic.report.table_parts import filled, kind
from kvpress_eval.diagnostic.report.verdicts import LOST
from kvpress_eval.diagnostic.report.words import budget_words, ends, joined_ends, level_ends
from kvpress_eval.diagnostic.words import STAGES
from kvpress_eval.report.tables import WIDE
from kvpress_eval.report.text import DASH, MODES, number, probability, signed

_COLOURS = {"better": "green", "worse": "red", None: ""}
LEGEND = (
    "Points of 100. Brackets: 95 % interval. Differences are paired, over tasks, by cluster; p by Holm over the arms of a budget. "
    "diagnostic: one slot differs from the base; transfer: several do, so a change has no single cause. Verdicts: percent of the "
    "replayed lost answers. Gap: share of positive lifts where the full cache beats the host minus the share elsewhere; without effect: "
    "what the raw split shows in this run if the arm were its host."
)


def tables(summary: Summary, details: bool = False, width: int = WIDE) -> Group:
    """What a reader wants to know first; with details every measure. width: in characters."""
    narrow = width < WIDE
    parts: list[RenderableType] = []
    for part in summary.parts:
        parts += [Text(sentence) for sentence in part.head]
        parts.append(Text())
        parts += _ladder(part, narrow, details)
        parts += [_verdicts(part, narrow), _signs(part, narrow)]
        if details:
            parts += detail_tables(part, narrow)
    if summary.failures:
        parts.append(_failures(summary))
    parts += [Text(problem.text, style="yellow") for problem in summary.problems]
    parts.append(Text(LEGEND, style="dim"))
    return Group(*parts)


def _ladder(part: Part, narrow: bool, details: bool) -> Iterator[Table]:
    """Over all budgets; with details at each of them as well."""
    for scope in part.grid.scopes if details else [part.grid.overall]:
        steps = [step for step in part.steps if step.budget == scope]
        if not steps:
            continue
        n_tasks = max(step.n_tasks for step in steps)
        title = (
            f"stage ladder at {budget_words(scope)}, {MODES[part.mode]}: mean of {n_tasks} task{'s' * (n_tasks != 1)}"
        )
        rows = [_step_row(step) for step in steps]
        yield filled(title, rows, left={"stage", "against", "kind"}, hide={"score", "p", "n"} if narrow else set())


def _step_row(step: Step) -> dict[str, Text | str]:
    return {
        "": step.arm,
        "stage": "null" if step.role == "null" else STAGES[step.stage],
        "against": step.base,
        "kind": kind(step.label, step.role),
        "score": number(step.score.value),
        "Δ": Text(signed(step.difference.value), style=_COLOURS[step.shown]),
        "95 %": ends(step.difference) + "†" * (step.interval == "bounded"),
        "p": probability(step.p_adjusted),
        "n": f"{step.difference.n:,}",
    }


def _verdicts(part: Part, narrow: bool) -> Table:
    """The host at each budget, every arm over all."""
    host, overall = part.grid.host, part.grid.overall
    of_all = [row for row in part.verdicts if row.task is None]
    chosen = [row for row in of_all if row.arm == host or row.budget == overall]
    rows: list[dict[str, Text | str]] = []
    for row in chosen:
        shares: dict[str, Text | str] = {
            name: DASH if not row.replayed else f"{number(row.shares[name].value, 0)} {level_ends(row.shares[name], 0)}"
            for name in LOST
        }
        lost = f"{row.lost}" if row.replayed == row.lost else f"{row.replayed} of {row.lost}"
        rows.append(
            {
                "": part.grid.name(row.arm),
                "at": "all" if row.budget is None else budget_words(row.budget),
                "lost": lost,
                "of": f"{row.n:,}",
                **shares,
            }
        )
    return filled("lost answers by stage, percent", rows, left={"at"}, hide={"of"} if narrow else set())


def _signs(part: Part, narrow: bool) -> Table:
    rows: list[dict[str, Text | str]] = []
    for row in part.signs.signs:
        if row.budget != part.grid.overall:
            continue
        if row.result is None:
            rows.append({"": row.arm, "kind": kind(row.label, row.role), "cross-fitted gap": "none"})
            continue
        crossed, raw, artefact = row.result.cross_fitted, row.result.raw, row.result.artefact
        rows.append(
            {
                "": row.arm,
                "kind": kind(row.label, row.role),
                "cross-fitted gap": joined_ends(crossed.rate_gap, 0),
                "raw": signed(raw.rate_gap.value, 0),
                "without effect": DASH if artefact is None else signed(artefact.raw["rate_gap"].expected, 0),
                "win gap": joined_ends(crossed.win_gap, 0),
                "r": signed(crossed.correlation.value, 2),
                "cells": f"{crossed.n_cells:g}",
                "tasks": f"{crossed.n_tasks}",
            }
        )
    hidden = {"win gap", "r", "tasks"} if narrow else set()
    return filled("does the margin's sign predict the lift's? all budgets", rows, left={"kind"}, hide=hidden)


def _failures(summary: Summary) -> Table:
    rows: list[dict[str, Text | str]] = [
        {"": Text(f"{failure.sentence}\n  {failure.command}")} for failure in summary.failures
    ]
    return filled("failing samples worth a look (RUN: the folder of the run)", rows)
