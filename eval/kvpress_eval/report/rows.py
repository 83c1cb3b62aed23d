"""The lines of a report. Scores, differences, intervals and shares of items are in points, 0 to 100; p values are not."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from kvpress_eval.records import Mode
from kvpress_eval.statistics import Verdict

#: what a macro row averages: every task meant for it; those without the floor and ceiling ones; only these
Scope = Literal["all", "informative", "floor or ceiling", "not averaged"]

UNITS = {
    "score, full_score, delta, ci_low, ci_high, lower_bound, retention, mean_abs": "points, 0 to 100",
    "ci_low, ci_high": "two-sided 95 % interval of delta",
    "lower_bound": "one-sided 95 % lower bound of delta, compared with the margin",
    "kept_bytes, full_bytes": "bytes, measured, mean over samples",
    "byte_share, kept_share": "share, 0 to 1",
    "seconds": "seconds a sample, mean",
    "p": "probability, of arm and full cache being exchangeable",
    "p_adjusted, p_no_loss": "probability, adjusted: rows by Benjamini-Hochberg over all rows with a test, macro by Holm "
    "over the arms of one family, length, mode and scope; p_no_loss is of a loss of the margin or more",
}


@dataclass(frozen=True)
class Cost:
    """What an arm cost, means over samples.

    decode_tokens_per_second: only where every sample was decoded alone; otherwise None, and decode_rows says with how many
    arms the time was shared at most. evidence and eviction are the arm's own, prefill is that of the shared pass.
    """

    kept_bytes: float
    full_bytes: float
    byte_share: float
    kept_share: float
    prefill_seconds: float
    evidence_seconds: float
    eviction_seconds: float
    decode_tokens_per_second: float | None
    decode_rows: int
    new_tokens: float


@dataclass(frozen=True)
class Row:
    """One task, length, mode and arm, over the samples that the full cache has as well.

    n: pairs; n_clusters: of them. missing: samples of the full cache that this arm lacks; extra: the other way round.
    incomplete: fewer samples than planned. score: mean over the pairs, full_score: of the full cache on the same ones.
    interval: the rule that gave ci_low and ci_high (`statistics/interval.py`). test: of p. lost, gained: items whose score
    fell or rose. solved, kept, retention...: see `statistics/retention.py`. p_no_loss: of a loss of the margin or more.
    within_noise: see `statistics/noise.py`; None where too few items were repeated, False where the verdict is a loss.
    truncated: samples that lost tokens to middle truncation; evidence_lost: of these, evidence that the answer needs.
    flags: how often each is set.
    """

    family: str
    task: str
    length: int | None
    mode: Mode
    arm: str
    metric: str
    n: int
    n_clusters: int
    missing: int
    extra: int
    incomplete: bool
    score: float
    score_low: float | None
    score_high: float | None
    full_score: float
    delta: float | None
    ci_low: float | None
    ci_high: float | None
    lower_bound: float | None
    interval: str
    p: float | None
    p_adjusted: float | None
    p_no_loss: float | None
    test: str
    verdict: Verdict | None
    within_noise: bool | None
    lost: int
    gained: int
    solved: int
    kept: int
    retention: float | None
    retention_low: float | None
    retention_high: float | None
    truncated: int
    evidence_lost: int
    in_macro: bool
    scope: Scope
    cost: Cost
    flags: dict[str, int] = field(default_factory=dict)

    def flat(self) -> dict[str, Any]:
        """All fields on one level, cost among them."""
        values = asdict(self)
        cost, flags = values.pop("cost"), values.pop("flags")
        return {**values, **cost, "flags": flags}


@dataclass(frozen=True)
class MacroRow:
    """The mean over tasks of one family, length, mode and arm; tasks count the same, items do not.

    n_min, n_max: items in the smallest and largest task. missing_tasks: those that the arm lacks; the others are still
    averaged, for arm and full cache alike, and the row is marked incomplete. solved, kept: items of all tasks; retention:
    mean of the tasks' shares, tasks of which the full cache solves nothing left out.
    """

    family: str
    length: int | None
    mode: Mode
    arm: str
    scope: Scope
    n_tasks: int
    tasks: tuple[str, ...]
    missing_tasks: tuple[str, ...]
    n_min: int
    n_max: int
    incomplete: bool
    score: float
    full_score: float
    delta: float | None
    ci_low: float | None
    ci_high: float | None
    lower_bound: float | None
    interval: str
    p: float | None
    p_adjusted: float | None
    p_no_loss: float | None
    verdict: Verdict | None
    within_noise: bool | None
    solved: int
    kept: int
    retention: float | None
    kept_bytes: float
    full_bytes: float
    byte_share: float
    kept_share: float


@dataclass(frozen=True)
class NoiseRow:
    """Two runs of the full cache against each other: see `statistics/noise.py`. other_text: answers that differ at all."""

    family: str
    task: str
    length: int | None
    mode: Mode
    n: int
    other_text: int
    changed: int
    flips: int
    delta: float
    delta_low: float | None
    delta_high: float | None
    mean_abs: float
    ci_low: float | None
    ci_high: float | None


def points(share: float | None) -> float | None:
    """A share of the score in points; rounding takes away what floats add behind the ninth digit."""
    return None if share is None else round(100 * share, 9)
