"""Means of what was measured, and shares of answers, with their intervals.

A measure has no fixed range (a divergence, a logit margin), so its interval is Student's: the clusters' linearised variance of the mean
(`Stratum.variance`) with n / (n - 1), and one degree of freedom for each cluster but one. Samples of all tasks count alike, and tasks are not held
fixed: their differences are part of the spread, so the interval is rather too wide than too narrow. Fewer than five clusters,
or values that do not vary, have none. Shares have Wilson's, with the effective number of answers (`statistics.retention`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from kvpress_eval.statistics import Stratum, wilson
from kvpress_eval.statistics.distributions import student_quantile
from kvpress_eval.statistics.interval import MIN_CLUSTERS
from kvpress_eval.statistics.retention import effective_size

#: a variance this small is rounding
_NOTHING = 1e-24


@dataclass(frozen=True)
class Mean:
    """A mean of n values in n_clusters clusters; value is None where there are none, low and high where there is no interval."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    n_clusters: int

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval and it does not hold 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean(
    values: Sequence[float], clusters: Sequence[Hashable], bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Mean:
    """Mean and 95 % interval of a measure. bounds: what it can be at all."""
    if not values:
        return Mean(None, None, None, 0, 0)
    stratum = Stratum.of(values, clusters)
    n, found = stratum.n_clusters, stratum.mean
    if n < MIN_CLUSTERS or stratum.variance <= _NOTHING:
        return Mean(found, None, None, stratum.n, n)
    half = student_quantile(0.975, n - 1) * math.sqrt(stratum.variance * n / (n - 1))
    return Mean(found, max(bounds[0], found - half), min(bounds[1], found + half), stratum.n, n)


def share(hits: Sequence[bool], clusters: Sequence[Hashable]) -> Mean:
    """Percent of answers, with Wilson's 95 % interval."""
    if not hits:
        return Mean(None, None, None, 0, 0)
    stratum = Stratum.of([float(hit) for hit in hits], clusters)
    n = effective_size(stratum)
    low, high = wilson(stratum.mean * n, n)
    return Mean(100 * stratum.mean, 100 * low, 100 * high, stratum.n, stratum.n_clusters)
