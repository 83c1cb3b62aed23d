"""The clustered, stratified bootstrap of a mean: clusters are resampled within their stratum, strata are fixed.

One task is one stratum. A macro average over tasks has one stratum a task, averaged with equal weights. Percentile and
BCa intervals follow Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 14; for more than one
stratum the acceleration is that of several samples (ibid., 14.9 and problem 14.5: sums over all strata).

With few clusters a bootstrap distribution is too narrow twice over: its variance lacks the factor n / (n - 1), and its
quantiles know nothing of Student's t. `widen` repairs both by asking for quantiles farther out, as Hesterberg's expanded
percentile interval does (arXiv 1411.5279, section 5.2); for several strata the factor is the ratio of the corrected to the
plain variance, and the degrees of freedom are Satterthwaite's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvpress_eval.statistics.distributions import normal_cdf, normal_quantile, student_quantile
from kvpress_eval.statistics.strata import Array, Stratum, mean_over

Method = Literal["percentile", "bca"]
N_RESAMPLES = 10_000
#: rows of the matrix of resampled clusters that are in memory at a time
_BLOCK = 1_000


@dataclass(frozen=True)
class Bootstrap:
    """A bootstrap distribution of a mean, and what it takes to read intervals off it.

    draws (n_resamples,): sorted. bias: z0 of BCa. acceleration: a of BCa. freedom, inflation: of the widening.
    """

    estimate: float
    draws: Array
    bias: float
    acceleration: float
    freedom: float
    inflation: float

    @classmethod
    def of(cls, strata: Sequence[Stratum], rng: np.random.Generator, *, n_resamples: int = N_RESAMPLES) -> Bootstrap:
        """Resample; every stratum needs two clusters or more, and the variance must not be zero.

        Raises:
            ValueError: a stratum has fewer than two clusters, or nothing varies.
        """
        if any(stratum.n_clusters < 2 for stratum in strata):
            raise ValueError("a bootstrap needs two clusters or more in every stratum")
        variances = np.array([stratum.variance for stratum in strata])
        if variances.sum() == 0:
            raise ValueError("a bootstrap of values that do not vary says nothing")
        n_clusters = np.array([stratum.n_clusters for stratum in strata])
        corrected = variances * n_clusters / (n_clusters - 1)
        estimate = mean_over(strata)
        draws = np.sort(np.mean([_draw(stratum, rng, n_resamples) for stratum in strata], axis=0))
        return cls(
            estimate=estimate,
            draws=draws,
            bias=_bias(draws, estimate),
            acceleration=_acceleration(strata),
            freedom=float(corrected.sum() ** 2 / (corrected**2 / (n_clusters - 1)).sum()),
            inflation=math.sqrt(corrected.sum() / variances.sum()),
        )

    def interval(self, confidence: float, method: Method, *, widen: bool = True) -> tuple[float, float]:
        """Lower and upper end of the two-sided interval."""
        tail = (1 - confidence) / 2
        low, high = self._end(tail, method, widen), self._end(1 - tail, method, widen)
        return low, high

    def resolves(self, tail: float) -> bool:
        """Whether there are resamples enough to know a widened bound that is passed with this probability."""
        return normal_cdf(self._widened(tail)) >= 1 / len(self.draws)

    def _widened(self, probability: float) -> float:
        return self.inflation * student_quantile(probability, self.freedom)

    def _end(self, probability: float, method: Method, widen: bool) -> float:
        z = self._widened(probability) if widen else normal_quantile(probability)
        if method == "bca":
            shifted = self.bias + z
            z = self.bias + shifted / (1 - self.acceleration * shifted)
        return float(np.quantile(self.draws, normal_cdf(z)))


def _draw(stratum: Stratum, rng: np.random.Generator, n_resamples: int) -> Array:
    means = []
    for start in range(0, n_resamples, _BLOCK):
        shape = (min(_BLOCK, n_resamples - start), stratum.n_clusters)
        chosen = rng.integers(0, stratum.n_clusters, size=shape)
        means.append(stratum.sums[chosen].sum(axis=1) / stratum.sizes[chosen].sum(axis=1))
    return np.concatenate(means)


def _bias(draws: Array, estimate: float) -> float:
    """z0: half of the draws that equal the estimate count as below it; scores are often discrete."""
    tolerance = 1e-12
    below = (np.sum(draws < estimate - tolerance) + np.sum(draws <= estimate + tolerance)) / (2 * len(draws))
    return normal_quantile(float(np.clip(below, 1 / len(draws), 1 - 1 / len(draws))))


def _acceleration(strata: Sequence[Stratum]) -> float:
    """From the jackknife over clusters."""
    cubes = squares = 0.0
    for stratum in strata:
        n = stratum.n_clusters
        left_out = (stratum.sums.sum() - stratum.sums) / (stratum.sizes.sum() - stratum.sizes)
        effect = (n - 1) * (left_out.mean() - left_out)
        cubes += float((effect**3).sum()) / n**3
        squares += float((effect**2).sum()) / n**2
    return cubes / (6 * squares**1.5) if squares else 0.0
