"""The noise floor: how much the score moves when nothing changes but kernels and batch shape.

Arm `full_repeat` keeps everything, as `full` does, and computes it another way. Greedy decoding turns a last bit of
difference into another token now and then, so their answers differ on some items. A difference of an arm that is not
larger than that is nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvpress_eval.statistics.interval import Estimate
from kvpress_eval.statistics.paired import Pairs
from kvpress_eval.statistics.strata import Stratum


@dataclass(frozen=True)
class NoiseFloor:
    """n: pairs. changed: items whose score differs; flips: items that one run solves and the other does not.

    mean_abs: mean |difference| of an item; low, high: its 95 % interval. difference: mean difference, where changes up
    and down cancel.
    """

    n: int
    changed: int
    flips: int
    difference: float
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
        mean_abs=estimate.mean,
        low=interval.low,
        high=interval.high,
    )
