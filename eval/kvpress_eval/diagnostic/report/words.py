"""Numbers of the report in words, the same on the terminal and on the page."""

from __future__ import annotations

import re

from kvpress_eval.diagnostic.quantity import Quantity
from kvpress_eval.diagnostic.report.means import Mean
from kvpress_eval.report.text import DASH, number, signed

_BUDGET = re.compile(r"([\d.]+)(\D+)\Z")
Number = Mean | Quantity


def budget_words(budget: str | None) -> str:
    """ "5%" as "5 %", None as "all budgets"."""
    if budget is None:
        return "all budgets"
    found = _BUDGET.match(budget)
    return f"{found[1]} {found[2]}" if found else budget


def ends(of: Number | None, digits: int = 1, factor: float = 1.0) -> str:
    """The interval in brackets; a dash where there is none."""
    if of is None or of.low is None or of.high is None:
        return DASH
    low, high = signed(factor * of.low, digits), signed(factor * of.high, digits)
    return f"[{low}, {high}]"


def level_ends(of: Number | None, digits: int = 1, factor: float = 1.0) -> str:
    """As `ends`, for numbers that have no sign."""
    if of is None or of.low is None or of.high is None:
        return DASH
    return f"[{number(factor * of.low, digits)}, {number(factor * of.high, digits)}]"


def joined_ends(of: Number, digits: int = 1) -> str:
    """A difference and its interval, where there are any."""
    interval = ends(of, digits)
    return signed(of.value, digits) + ("" if interval == DASH else f" {interval}")


def with_ends(of: Number, digits: int = 1, unit: str = "") -> str:
    """A difference and its interval; says so where there is none."""
    interval = ends(of, digits)
    return f"{signed(of.value, digits)}{unit} {interval if interval != DASH else '(no interval)'}"


def holds_zero(of: Number) -> bool | None:
    """Whether the interval holds 0; None where there is none."""
    return None if of.low is None or of.high is None else of.low <= 0 <= of.high


def plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def joined(names: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
