"""The summary for machines: one JSON object, or its rows as CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from typing import Any

from kvpress_eval.report.rows import UNITS
from kvpress_eval.report.summary import Summary

#: a spreadsheet would compute a cell that begins with one of these
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def to_json(summary: Summary) -> dict[str, Any]:
    """Rows, macro rows, noise floor and manifest; scores in points, as "units" says."""
    return {
        "units": UNITS,
        "margins": summary.margins,
        "n_records": summary.n_records,
        "problems": [asdict(problem) for problem in summary.problems],
        "caveats": summary.caveats,
        "rows": [row.flat() for row in summary.rows],
        "macro": [asdict(row) for row in summary.macro],
        "noise_floor": [asdict(row) for row in summary.noise],
        "manifest": summary.manifest,
    }


def to_csv(summary: Summary) -> str:
    """One line for each task, length, mode and arm; an empty field is a value that does not exist."""
    lines = [{**row.flat(), "flags": "; ".join(f"{name} {n}" for name, n in row.flags.items())} for row in summary.rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in line.items()} for line in lines)
    return text.getvalue()


def _cell(value: Any) -> Any:
    """Texts come from task and contract names, which a user may have from elsewhere: none may begin a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
