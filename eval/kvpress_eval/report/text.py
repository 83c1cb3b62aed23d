"""Numbers and intervals as words, the same on the terminal and on the page."""

from __future__ import annotations

from kvpress_eval.report.rows import MacroRow, Row

DASH = "–"
MODES = {"query_aware": "query-aware", "query_agnostic": "query-agnostic"}


def number(value: float | None, digits: int = 1) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 1) -> str:
    """With its sign, and without a sign where it rounds to zero."""
    if value is None:
        return DASH
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"


def interval(row: Row | MacroRow) -> str:
    """With a dagger where it is a worst-case bound."""
    if row.ci_low is None:
        return DASH
    return f"{signed(row.ci_low)} to {signed(row.ci_high)}" + "†" * (row.interval == "bounded")


def probability(value: float | None) -> str:
    if value is None:
        return DASH
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def size(n_bytes: float) -> str:
    """Bytes in units of powers of ten."""
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= divisor:
            return f"{n_bytes / divisor:.1f} {unit}"
    return f"{n_bytes:.0f} B"


def length_name(length: int | None) -> str:
    return "own length" if length is None else f"{length:,} tokens"


def count(low: int, high: int) -> str:
    """A number of items that may differ between tasks."""
    return str(low) if low == high else f"{low} to {high}"


def verdict_words(row: Row | MacroRow, margin: float) -> str:
    """What stands behind a verdict. margin: share of the score."""
    if row.delta is None:
        return "the reference"
    if row.ci_low is None or row.lower_bound is None:
        return "too few clusters for an interval"
    noise = "; in noise" if row.within_noise else ""
    if row.verdict == "no loss":
        return f"not {100 * margin:g} or more{noise}"
    if row.verdict == "loss":
        return f"worse, beyond chance{noise}"
    if row.lower_bound > -100 * margin:
        return f"not {100 * margin:g} or more alone, but not beside so many arms{noise}"
    return f"may lose up to {number(-row.lower_bound)}{noise}"
