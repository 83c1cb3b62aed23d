"""Retention: of the items that the full cache solves, the share that an arm still solves.

A mean difference adds what the arm lost to what it gained by luck; retention looks at the losses alone. What "solves"
means follows the metric. A match metric (substrings, labels, numbers) says itself when an answer is complete: score 1, so an
answer with three of four needles is not solved. An overlap metric (token F1, ROUGE-L, edit similarity) reaches 1 only for
the reference's own wording, so an item counts as solved from 0.5: at F1 0.5 the answer shares half of its words with the
reference (harmonic mean of precision and recall), and below that it is more often about something else. Long summaries
seldom reach 0.5; the number of items stands beside the share.

The interval is Wilson's, with an effective sample size where items share clusters (Dean and Pagano 2015, "Evaluating
confidence interval methods for binomial proportions in clustered surveys"): n is divided by the design effect, down to the
number of clusters and never above n; where all items have the same outcome, it is the number of clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvpress_eval.statistics.binary import wilson
from kvpress_eval.statistics.paired import Pairs
from kvpress_eval.statistics.strata import Stratum

OVERLAP_METRICS = ("qa_f1", "rouge", "code_sim")
OVERLAP_THRESHOLD = 0.5
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Retention:
    """kept of solved items; share, low and high are None where the full cache solves nothing."""

    solved: int
    kept: int
    share: float | None
    low: float | None
    high: float | None


def threshold(metric: str) -> float:
    """The score from which an item counts as solved under this metric."""
    return OVERLAP_THRESHOLD if metric.startswith(OVERLAP_METRICS) else 1 - _ROUNDING


def retention(pairs: Pairs, solved_from: float, confidence: float = 0.95) -> Retention:
    """Retention over the pairs of one task, for a threshold such as `threshold(metric)`."""
    chosen = np.flatnonzero(pairs.full >= solved_from)
    if not len(chosen):
        return Retention(0, 0, None, None, None)
    kept = (pairs.arm[chosen] >= solved_from).astype(np.float64)
    stratum = Stratum.of(kept.tolist(), [pairs.clusters[index] for index in chosen])
    n = effective_size(stratum)
    low, high = wilson(stratum.mean * n, n, confidence)
    return Retention(len(chosen), int(kept.sum()), stratum.mean, low, high)


def effective_size(rates: Stratum) -> float:
    """Number of independent right-or-wrong items that would know the rate as well as these clustered ones."""
    if rates.n_clusters == rates.n:
        return float(rates.n)
    rate = rates.mean
    if rates.n_clusters == 1 or rate in (0.0, 1.0):
        return float(rates.n_clusters)
    corrected = rates.variance * rates.n_clusters / (rates.n_clusters - 1)
    if corrected == 0:
        return float(rates.n_clusters)
    return float(np.clip(rate * (1 - rate) / corrected, rates.n_clusters, rates.n))
