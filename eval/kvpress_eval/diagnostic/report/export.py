"""The summary for machines: one JSON object."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any

from kvpress_eval.diagnostic.report.measures import MEASURES
from kvpress_eval.diagnostic.report.summary import Part, Summary

UNITS = {
    "value, low, high": "a number and its two-sided 95 % interval; null where it is undefined or too little is known",
    "n, n_clusters": "answers, and independent clusters of them; n_cells, n_tasks: cells, on average over splits, and tasks",
    "score, base_score, difference, to_host, to_full, delta, margin": "points, 0 to 100; differences are paired",
    "p, p_adjusted": "probability; adjusted by Holm over the arms of one budget and mode",
    "shares, by_chance, improved": "percent of lost and replayed answers, of samples that exchange anything",
    "measures": "shares from 0 to 1, total variation from 0 to 1, logits, nats; see words",
    "rate_gap, win_gap, match": "percentage points and percent of cells",
    "budget": "null for all budgets together",
}


def to_json(summary: Summary) -> dict[str, Any]:
    """Everything that the page shows, as plain JSON."""
    study = summary.study
    return {
        "units": UNITS,
        "head": summary.head,
        "host": study.host_name,
        "models": [run.model for run in summary.runs],
        "n_records": summary.n_records,
        "comparisons": [{**plain(each), "label": each.label} for each in study.comparisons],
        "modes": {part.mode: _part(part) for part in summary.parts},
        "words": {name: measure.words for name, measure in MEASURES.items()},
        "failures": plain(summary.failures),
        "problems": plain(summary.problems),
        "settings": summary.settings.model_dump(mode="json"),
        "manifests": [run.manifest for run in summary.runs],
    }


def _part(part: Part) -> dict[str, Any]:
    return {
        "head": part.head,
        "budgets": list(part.grid.budgets),
        "levels": plain(part.levels),
        "steps": plain(part.steps),
        "measures": plain(part.measures),
        "verdicts": plain(part.verdicts),
        "exchanges": plain(part.exchanges),
        "units": plain(part.units),
        **{field.name: plain(getattr(part.signs, field.name)) for field in fields(part.signs)},
    }


def plain(value: Any) -> Any:
    """Dataclasses and named tuples as objects, other sequences as arrays; a number that is none as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
