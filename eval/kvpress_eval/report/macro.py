"""Macro rows: the mean over the tasks of a family, for each length, mode and arm.

Three scopes. "all": every task that is meant for averages, which is what publications average. "informative": without the
tasks at the floor or ceiling, which dilute every difference. "floor or ceiling": these alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvpress_eval.records import FULL, FULL_REPEAT
from kvpress_eval.report.cells import Cell
from kvpress_eval.report.rows import MacroRow, Row, Scope, points
from kvpress_eval.statistics import Estimate, Pairs, macro_estimate, sign_flip, within_noise
from kvpress_eval.statistics.strata import generator

SCOPES: tuple[Scope, ...] = ("all", "informative", "floor or ceiling")


@dataclass(frozen=True)
class Part:
    """What one cell gives to a macro row: its row and pairs under one arm; repeats: the full cache's second run."""

    row: Row
    pairs: Pairs
    repeats: Pairs | None


def macro_rows(cells: Sequence[Cell], parts: Mapping[tuple[str, str], Part], margin: float) -> list[MacroRow]:
    """All macro rows of one family, length and mode. parts: by (task, arm)."""
    rows = []
    noise: dict[tuple[str, ...], Estimate | None] = {}  # most arms have the same tasks
    arms = [arm for arm in dict.fromkeys(arm for cell in cells for arm in cell.arms) if arm != FULL_REPEAT]
    for scope in SCOPES:
        chosen = [cell for cell in cells if cell.in_macro and scope in ("all", cell.scope)]
        for arm in arms:
            present = [parts[cell.task, arm] for cell in chosen if (cell.task, arm) in parts]
            if present:
                missing = tuple(cell.task for cell in chosen if (cell.task, arm) not in parts)
                tasks = tuple(part.row.task for part in present)
                if tasks not in noise:
                    noise[tasks] = _noise(present, chosen[0].seed)
                rows.append(_row(arm, scope, present, missing, noise[tasks], margin, chosen[0].seed))
    return rows


def _noise(parts: Sequence[Part], seed: int) -> Estimate | None:
    """The mean difference of the full cache's second run over these tasks; None unless each of them was repeated."""
    repeats = {part.row.task: part.repeats for part in parts if part.repeats is not None}
    first = parts[0].row
    name = ("macro noise", first.family, first.length, first.mode, *repeats)
    return macro_estimate(repeats, *name, seed=seed) if len(repeats) == len(parts) else None


def _row(
    arm: str,
    scope: Scope,
    parts: Sequence[Part],
    missing: tuple[str, ...],
    noise: Estimate | None,
    margin: float,
    seed: int,
) -> MacroRow:
    first, rows = parts[0].row, [part.row for part in parts]
    name = (first.family, first.length, first.mode, scope)
    estimate = macro_estimate({part.row.task: part.pairs for part in parts}, "macro", *name, seed=seed)
    is_full, interval = arm == FULL, estimate.interval()
    tested = not is_full and estimate.rule != "none"
    p = sign_flip(estimate.strata, generator(seed, "macro flip", *name)) if tested else None
    shares = [row.retention for row in rows if row.retention is not None]
    return MacroRow(
        family=first.family,
        length=first.length,
        mode=first.mode,
        arm=arm,
        scope=scope,
        n_tasks=len(rows),
        tasks=tuple(row.task for row in rows),
        missing_tasks=missing,
        n_min=min(row.n for row in rows),
        n_max=max(row.n for row in rows),
        incomplete=bool(missing) or any(row.incomplete for row in rows),
        score=_mean([row.score for row in rows]),
        full_score=_mean([row.full_score for row in rows]),
        delta=None if is_full else 100 * estimate.mean,
        ci_low=None if is_full else points(interval.low),
        ci_high=None if is_full else points(interval.high),
        lower_bound=None if is_full else points(estimate.lower_bound()),
        interval="none" if is_full else estimate.rule,
        p=p,
        p_adjusted=None,
        p_no_loss=None if is_full else estimate.p_no_loss(margin),
        verdict=None,
        within_noise=None if is_full or noise is None else within_noise(estimate.mean, noise.n, noise.interval()),
        solved=sum(row.solved for row in rows),
        kept=sum(row.kept for row in rows),
        retention=_mean(shares) if shares else None,
        kept_bytes=_mean([row.cost.kept_bytes for row in rows]),
        full_bytes=_mean([row.cost.full_bytes for row in rows]),
        byte_share=_mean([row.cost.byte_share for row in rows]),
        kept_share=_mean([row.cost.kept_share for row in rows]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
