"""Verdicts of all rows together: p values are adjusted for the questions asked beside each other.

Task rows by Benjamini-Hochberg over every row with a test (a screen: where to look), macro rows by Holm within one family,
length, mode and scope (claims that are read together). This goes for both questions: "is there a loss" and "is the loss
smaller than the margin".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from kvpress_eval.report.rows import MacroRow, Row
from kvpress_eval.statistics import benjamini_hochberg, holm, verdict

AnyRow = TypeVar("AnyRow", Row, MacroRow)
Adjust = Callable[[Sequence[float]], list[float]]


def judged_rows(rows: Sequence[Row]) -> list[Row]:
    return _judged(rows, benjamini_hochberg)


def judged_macro(rows: Sequence[MacroRow]) -> list[MacroRow]:
    """One table of macro rows is one family of hypotheses."""
    tables: dict[tuple[object, ...], list[MacroRow]] = {}
    for row in rows:
        tables.setdefault((row.family, row.length, row.mode, row.scope), []).append(row)
    return [row for table in tables.values() for row in _judged(table, holm)]


def _judged(rows: Sequence[AnyRow], adjust: Adjust) -> list[AnyRow]:
    p_loss, p_no_loss = _adjusted([row.p for row in rows], adjust), _adjusted([row.p_no_loss for row in rows], adjust)
    return [_with_verdict(*found) for found in zip(rows, p_loss, p_no_loss, strict=True)]


def _adjusted(values: Sequence[float | None], adjust: Adjust) -> list[float | None]:
    found = iter(adjust([value for value in values if value is not None]))
    return [None if value is None else next(found) for value in values]


def _with_verdict(row: AnyRow, p_loss: float | None, p_no_loss: float | None) -> AnyRow:
    if row.delta is None:
        return row
    found = verdict(row.delta, row.ci_high, p_loss, p_no_loss)
    # the noise run is small; a loss that is shown is not taken back by it
    within_noise = False if found == "loss" else row.within_noise
    return replace(row, p_adjusted=p_loss, p_no_loss=p_no_loss, verdict=found, within_noise=within_noise)
