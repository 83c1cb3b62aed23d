"""Macro averages: tasks count the same, items do not.

The tasks are fixed, not a sample of tasks: the interval says how the average over these tasks would vary with other items,
not with other tasks. Clusters are resampled within their task.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvpress_eval.statistics.interval import Estimate
from kvpress_eval.statistics.paired import Pairs


def macro_estimate(pairs: Mapping[str, Pairs], *name: object, seed: int = 0) -> Estimate:
    """The mean over tasks of the mean paired difference.

    Raises:
        ValueError: there is no task, or one without pairs.
    """
    if not pairs or not all(len(of_task) for of_task in pairs.values()):
        raise ValueError("a macro average needs one task or more, and pairs in each")
    strata = [pairs[task].differences for task in sorted(pairs)]
    return Estimate(strata, (-1.0, 1.0), name, seed)
