"""The noise floor: how much the score moves when nothing changes but kernels and batch shape.

Arm `full_repeat` keeps everything, as `full` does, and computes it another way. Greedy decoding turns a last bit of
difference into another token now and then, so their answers differ on some items, up and down. A mean difference of an
arm that lies within the 95 % interval of the repeat's own mean difference could be such a difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvpress_eval.statistics.interval import Estimate, Interval
from kvpress_eval.statistics.paired import Pairs
from kvpress_eval.statistics.strata import Stratum

#: repeated items without which nothing is said to be within the noise
MIN_REPEATS = 20


@dataclass(frozen=True)
class NoiseFloor:
    """n: pairs. changed: items whose score differs; flips: items that one run solves and the other does not.

    mean_abs: mean |difference| of an item; low, high: its 95 % interval. difference: mean difference, where changes up
    and down cancel; difference_interval: its own.
    """

    n: int
    changed: int
    flips: int
    difference: float
    difference_interval: Interval
    mean_abs: float
    low: float | None
    high: float | None


def noise_floor(pairs: Pairs, solved_from: float, *name: object, seed: int = 0) -> NoiseFloor:
    """Noise floor of one task from its pairs of `full_repeat` and `full`; there must be at least one."""
    differences = pairs.arm - pairs.full
    estimate = Estimate([Stratum.of(np.abs(differences), pairs.clusters)], (0.0, 1.0), name, seed)
    interval = estimate.interval()
    return NoiseFloor(
        n=len(pairs),
        changed=int(np.sum(differences != 0)),
        flips=int(np.sum((pairs.arm >= solved_from) != (pairs.full >= solved_from))),
        difference=float(differences.mean()),
        difference_interval=Estimate.of_differences(pairs, *name, seed=seed).interval(),
        mean_abs=estimate.mean,
        low=interval.low,
        high=interval.high,
    )


def within_noise(difference: float, n_repeats: int, interval: Interval) -> bool | None:
    """Whether a mean difference lies in the interval of the repeat's mean difference; None where this is not known.

    n_repeats: repeated items, without which the interval is too wide to be held against anything.
    """
    if n_repeats < MIN_REPEATS or interval.low is None or interval.high is None:
        return None
    return interval.low <= difference <= interval.high
