"""The tables that `details` adds: measures of the three stages, boundary, units, thresholds, leverage, trajectories, coupling."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from kvpress_eval.diagnostic.leverage import LeverageSplit
from kvpress_eval.diagnostic.report.leverage_words import LEVERAGE
from kvpress_eval.diagnostic.report.means import Mean
from kvpress_eval.diagnostic.report.summary import Part
from kvpress_eval.diagnostic.report.table_parts import filled, kind
from kvpress_eval.diagnostic.report.words import budget_words, joined_ends, level_ends, with_ends
from kvpress_eval.report.text import DASH, number

Rows = list[dict[str, Text | str]]
#: tables of measures: title, columns by measure
_STAGES: tuple[tuple[str, dict[str, str]], ...] = (
    ("I access: kept of decode attention, distance of the arm's law, evidence", {
        "kept_decode": "kept", "tv_decode": "law", "gold_tokens": "gold", "gold_whole": "whole", "group_broken": "group broken",
    }),
    ("I access: the two sides of Prop. 3 at the first decode step", {
        "tv_first": "left", "tv_phase": "TV(p*, p_T)", "tv_fit": "eta_proj", "tv_bound": "right",
    }),
    ("II value: change of the attention output", {"predicted": "predicted", "measured": "measured", "agreement": "agreement"}),
    ("III fit and the answer", {"eps_lat": "unused", "ties": "ties", "kept_mass": "mass kept", "lowest": "margin", "divergence": "KL"}),
)  # fmt: skip


def detail_tables(part: Part, narrow: bool) -> Iterator[Table]:
    """Over all budgets together; the page and the JSON have each of them."""
    overall = part.grid.overall
    measured = [row for row in part.measures if row.budget == overall]
    for title, columns in _STAGES:
        shown = list(columns)[:3] if narrow else list(columns)
        rows: Rows = [
            {
                "": part.grid.name(row.arm),
                **{columns[name]: _cell(row.values[name]) for name in shown},
                "n": f"{row.n:,}",
            }
            for row in measured
        ]
        yield filled(title, rows)
    if part.exchanges:
        yield filled(
            "boundary: exchanges against as many at random, nats",
            [
                {
                    "": row.arm,
                    "exchanged": _cell(row.exchanged, interval=False),
                    "near": _cell(row.near, interval=False),
                    "gain": _signed(row.gain),
                    "beyond chance": _signed(row.advantage),
                    "n": f"{row.n:,}",
                }
                for row in part.exchanges
                if row.budget == overall
            ],
        )
    if part.units:
        yield filled(
            "single units: how well a ranking orders them",
            [
                {
                    "": part.grid.name(row.ranking),
                    "Spearman": _signed(row.spearman),
                    "AUC": _cell(row.auc),
                    "n": f"{row.n:,}",
                }
                for row in part.units
                if row.budget == overall
            ],
        )
    yield from _thresholds(part)
    yield from _leverage(part)
    if part.signs.trajectories:
        yield _trajectories(part)
    yield _couplings(part)


def _thresholds(part: Part) -> Iterator[Table]:
    rows: Rows = []
    for row in part.signs.signs:
        if row.budget == part.grid.overall and row.result is not None:
            gaps = {
                f"|m| ≥ {each.threshold:g}": joined_ends(each.cross_fitted.rate_gap, 0)
                for each in row.result.thresholds
            }
            rows.append({"": part.grid.name(row.arm), **gaps})
    if rows:
        yield filled("cross-fitted gap by threshold of the margin", rows)


def _leverage(part: Part) -> Iterator[Table]:
    for row in part.signs.leverage:
        if row.result is None:
            continue
        found = row.result
        sides: tuple[tuple[str, LeverageSplit], ...] = (("cross-fitted", found.cross_fitted), ("raw", found.raw))
        rows: Rows = [
            {
                "": words,
                **{
                    name: f"{number(getattr(split, field).share.value, 0)} % {level_ends(getattr(split, field).share, 0)}"
                    for name, split in sides
                },
            }
            for field, words in LEVERAGE.items()
        ]
        residual = with_ends(found.mean_residual, 2)
        yield filled(
            f"leverage, {found.mii} against {found.nolev}: residual {residual} points, {found.n_cells} cells", rows
        )


def _trajectories(part: Part) -> Table:
    rows: Rows = []
    for row in part.signs.trajectories:
        if row.result is None:
            rows.append({"": row.arm, "kind": kind(row.label, row.role), "n": "0"})
            continue
        by_budget = {budget_words(each.budget): joined_ends(each.mean) for each in row.result.at_budget}
        rows.append(
            {
                "": row.arm,
                "kind": kind(row.label, row.role),
                **by_budget,
                "rising": f"{row.result.rising}",
                "falling": f"{row.result.falling}",
                "n": f"{row.result.n}",
            }
        )
    return filled("lift over the host by budget, and trajectories", rows, left={"kind"})


def _couplings(part: Part) -> Table:
    tasks = dict.fromkeys(row.task for row in part.signs.couplings)
    known = {row.task: row.phi for row in part.signs.couplings}
    rows: Rows = [{"": task, "phi": "not known" if known[task] is None else number(known[task], 2)} for task in tasks]
    return filled("coupling of the tasks", rows)


def _cell(of: Mean, digits: int = 2, *, interval: bool = True) -> str:
    if of.value is None:
        return DASH
    shown = number(of.value, digits)
    return f"{shown} {level_ends(of, digits)}" if interval and of.low is not None else shown


def _signed(of: Mean) -> str:
    return joined_ends(of, 3)
