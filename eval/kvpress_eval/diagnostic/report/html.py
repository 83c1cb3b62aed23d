"""The page: one HTML file that needs nothing else and asks nobody for anything.

It has the look, the script and the policy of an evaluation's page (`kvpress_eval.report.html`): texts of a run are untrusted, the template escapes all of
them, and no script runs but the one whose hash the page names.
"""

from __future__ import annotations

import json
from typing import Any

from kvpress_eval.diagnostic.report import words
from kvpress_eval.diagnostic.report.figures import Figures, figures
from kvpress_eval.diagnostic.report.grid import STAGE_ORDER
from kvpress_eval.diagnostic.report.leverage_words import LEVERAGE
from kvpress_eval.diagnostic.report.measures import MEASURES
from kvpress_eval.diagnostic.report.sign_rows import MIN_BUDGETS
from kvpress_eval.diagnostic.report.summary import Part, Summary
from kvpress_eval.diagnostic.report.verdicts import LOST
from kvpress_eval.diagnostic.words import MEANING, STAGES
from kvpress_eval.records import FULL
from kvpress_eval.report import text
from kvpress_eval.report.losses import shorten
from kvpress_eval.report.page import render
from kvpress_eval.statistics.interval import MIN_CLUSTERS

#: measures of one table, by its heading
MEASURE_TABLES: dict[str, tuple[str, ...]] = {
    "I access: what decoding reads, and the evidence": (
        "kept_decode", "tv_decode", "gold_tokens", "gold_whole", "gold_broken", "group_broken",
    ),
    "I access: both sides of Prop. 3 at the first decode step": ("tv_first", "tv_phase", "tv_fit", "tv_bound"),
    "II value: change of the attention output": ("predicted", "measured", "agreement"),
    "III fit, and the answer": ("eps_lat", "ties", "kept_mass", "lowest", "log_probability", "divergence"),
}  # fmt: skip


def to_html(summary: Summary) -> str:
    """The whole page."""
    parts: list[tuple[Part, Figures]] = [(part, figures(part, summary.settings)) for part in summary.parts]
    return render(
        "kvpress_eval.diagnostic.report",
        {
            "number": text.number,
            "signed": text.signed,
            "probability": text.probability,
            "length_name": text.length_name,
            "ends": words.ends,
            "level_ends": words.level_ends,
            "joined_ends": words.joined_ends,
            "budget": words.budget_words,
            "shown": shorten,
        },
        summary=summary,
        parts=parts,
        facts=facts(summary),
        models=words.joined([run.model for run in summary.runs]),
        host=summary.study.host_name,
        modes=text.MODES,
        FULL=FULL,
        LOST=LOST,
        STAGES=STAGES,
        STAGE_ORDER=STAGE_ORDER,
        MEANING=MEANING,
        MEASURES=MEASURES,
        MEASURE_TABLES=MEASURE_TABLES,
        LEVERAGE=LEVERAGE,
        MIN_CLUSTERS=MIN_CLUSTERS,
        MIN_BUDGETS=MIN_BUDGETS,
        manifest=json.dumps([run.manifest for run in summary.runs], indent=2, ensure_ascii=False),
    )


def facts(summary: Summary) -> list[tuple[str, str]]:
    """What ran, in a few words; a manifest of another shape leaves some of them out."""
    grids = [part.grid for part in summary.parts]
    places = {place for grid in grids for place in grid.answers[FULL, None]}
    latest = [_latest(run.manifest.get("software")) for run in summary.runs]
    found = [
        ("host", summary.study.host_name),
        ("models", ", ".join(run.model for run in summary.runs)),
        ("tasks", str(len({(place.task, place.length) for place in places}))),
        ("arms beside the host", str(len(summary.study.comparisons))),
        ("budgets", ", ".join(dict.fromkeys(words.budget_words(budget) for grid in grids for budget in grid.budgets))),
        ("modes", ", ".join(text.MODES[grid.mode] for grid in grids)),
        ("lengths", ", ".join(dict.fromkeys(text.length_name(place.length) for place in sorted(places, key=str)))),
        ("device", ", ".join(dict.fromkeys(str(one["device"]) for one in latest if one.get("device")))),
        ("begun", str(summary.runs[0].manifest.get("created", "")).replace("T", " ").removesuffix("+00:00")),
    ]
    return [(name, value) for name, value in found if value]


def _latest(software: Any) -> dict[str, Any]:
    last = software[-1] if isinstance(software, list) and software else None
    return last if isinstance(last, dict) else {}
