"""The rate gap without each task in turn: does one task make the finding?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvpress_eval.diagnostic.tally import Tally


@dataclass(frozen=True)
class WithoutTask:
    """The rate gap without one task and its change, percentage points; None where a group is empty."""

    task: str
    rate_gap: float | None
    change: float | None


def leave_one_task_out(of: Tally, tasks: Sequence[str]) -> tuple[WithoutTask, ...]:
    """Tasks that move the gap most first. of: [n_tasks, ...]."""
    whole = float(of.total().rate_gap)
    found = []
    for task, gap in zip(tasks, of.without_each().rate_gap, strict=True):
        known = bool(np.isfinite(gap) and np.isfinite(whole))
        found.append(WithoutTask(task, float(gap), float(gap) - whole) if known else WithoutTask(task, None, None))
    return tuple(sorted(found, key=lambda each: -abs(each.change or 0)))
