"""Right-or-wrong items: McNemar's test, Tango's interval of the paired difference, Wilson's interval of a rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from kvpress_eval.statistics.distributions import normal_quantile


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided mid-p of the exact McNemar test: only pairs that differ count, each side as likely as the other.

    mid-p counts half of the seen outcome, which takes away most of the exact test's excess caution (Fagerland, Lydersen
    and Laake 2013, "The McNemar test for binary matched-pairs data: mid-p and asymptotic are better than exact").

    lost: right with the full cache, wrong under the arm. gained: the other way round.
    """
    n, smaller = lost + gained, min(lost, gained)
    if lost == gained:
        return 1.0
    twice_the_tail = 2 * sum(math.comb(n, k) for k in range(smaller + 1))
    return min(1.0, float((twice_the_tail - math.comb(n, smaller)) / (1 << n)))  # integers: n may be thousands


def wilson(hits: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate (Wilson 1927). Both may be fractions, for an effective sample size.

    Raises:
        ValueError: n is not positive.
    """
    if n <= 0:
        raise ValueError("a rate of no items has no interval")
    z, rate = normal_quantile((1 + confidence) / 2), hits / n
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half))


def tango(lost: int, gained: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of the difference of two paired rates, arm minus full.

    Tango (1998), "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", Statistics in Medicine 17, equations 8 to 13. It has a width even where no pair differs: z^2 / (n + z^2) to each
    side.

    Raises:
        ValueError: there are no pairs, or fewer than differ.
    """
    if n <= 0 or lost + gained > n:
        raise ValueError(f"{lost} lost and {gained} gained do not fit into {n} pairs")
    z, seen = normal_quantile((1 + confidence) / 2), (gained - lost) / n

    def statistic(difference: float) -> float:
        return _score(lost, gained, n, difference)

    low = -1.0 if seen <= -1 else _crossing(statistic, z, -1.0, seen)
    high = 1.0 if seen >= 1 else _crossing(statistic, -z, seen, 1.0)
    return low, high


def _score(lost: int, gained: int, n: int, difference: float) -> float:
    """Score statistic of "the difference is this one"; falls as the difference grows."""
    a = 2 * n
    b = -gained - lost + (2 * n - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    lost_rate = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * lost_rate + difference * (1 - difference))
    distance = gained - lost - n * difference
    if variance <= 0:
        return math.copysign(math.inf, distance) if abs(distance) > 1e-12 else 0.0
    return distance / math.sqrt(variance)


def _crossing(statistic: Callable[[float], float], level: float, left: float, right: float) -> float:
    """Where a falling function takes the value `level`, by bisection."""
    for _ in range(60):
        middle = (left + right) / 2
        if statistic(middle) > level:
            left = middle
        else:
            right = middle
    return (left + right) / 2
