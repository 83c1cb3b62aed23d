"""Which interval a mean gets, decided here and nowhere else.

1. Fewer than five clusters in a task: none. With n clusters the most extreme of the 2^n patterns of signs has
   probability 2^(1-n); below five that is more than 0.1, and no method makes a claim of it.
2. Right-or-wrong items that are each a cluster of their own: the score interval (Wilson for a rate, Tango for a paired
   difference). It keeps its width where nothing differs: 0 of 10 changed gives -28 to +28 points, not 0 to 0.
3. Fewer than three clusters that differ from the most common value, in a macro average over all tasks together: the
   bounded interval (`bounded.py`). Every item the same is not certainty that the next is, and a bootstrap can only
   repeat what it saw. Three is where simulated studies of 10 to 50 items with rare changes (2 to 50 % of the items, of
   one sign or both) were covered by 94 % or more; a bootstrap after a single change covered 88 %.
4. Everything else: the clustered, stratified bootstrap, 10,000 resamples, percentiles with widened levels (`bootstrap.py`;
   in simulations with 10 to 50 clusters BCa, which `method` selects, covered no better).

Every interval is stretched, if need be, to contain its estimate.

A claim of no loss needs more than that. Values that are seldom far from zero, and then far, are under-covered while those
few are not among the items: losses drawn from beta(0.15, 3), whose mean is 5 points, were covered by a bootstrap's 95 %
interval in 81 % of simulated studies with 10 clusters, 85 % with 20, 88 to 90 % with 30, 90 to 93 % with 50 to 100, instead
of 95 %; beta(0.5, 2) in 90 % with 10 and 93 to 96 % from 20 on. The misses say "smaller than it is". So the one-sided bound of
such claims (`lower_bound`, `p_no_loss`) is Gaffke's below 30 clusters over all tasks, which was wrong in at most 1 % of
these studies; beyond, the lower one of the percentile and the BCa bootstrap, wrong in 7 to 10 % for beta(0.15, 3) and in
4 to 6 % for beta(0.5, 2), where 5 % are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from kvpress_eval.statistics.binary import tango, wilson
from kvpress_eval.statistics.bootstrap import N_RESAMPLES, Bootstrap, Method
from kvpress_eval.statistics.bounded import Bounded
from kvpress_eval.statistics.paired import Pairs
from kvpress_eval.statistics.strata import Stratum, generator, mean_over

MIN_CLUSTERS = 5
MIN_CHANGED = 3
#: clusters, over all strata, below which a claim of no loss is not left to the bootstrap
MIN_CLAIMED = 30
#: halvings of the search for a p value: to within 2^-26
_HALVINGS = 25

Rule = Literal["none", "wilson", "tango", "bounded", "bootstrap"]


@dataclass(frozen=True)
class Interval:
    """A two-sided interval; None for both ends where there is none."""

    low: float | None
    high: float | None


@dataclass
class Estimate:
    """A mean over strata, and its intervals by the rule that its data call for.

    strata: one for a task, one a task for a macro average. bounds: range of the values. pairs: given where the mean is
    the difference of binary items. seed, name: of the random numbers. binary: the values are rates of independent
    right-or-wrong items.
    """

    strata: Sequence[Stratum]
    bounds: tuple[float, float]
    name: tuple[object, ...]
    seed: int = 0
    pairs: Pairs | None = None
    binary: bool = False
    method: Method = "percentile"
    n_resamples: int = N_RESAMPLES
    _bootstrap: Bootstrap | None = field(default=None, repr=False)
    _bounded: Bounded | None = field(default=None, repr=False)

    @classmethod
    def of_differences(cls, pairs: Pairs, *name: object, seed: int = 0) -> Estimate:
        """The mean paired difference of one task."""
        return cls([pairs.differences], (-1.0, 1.0), name, seed, pairs=pairs if pairs.is_binary else None)

    @classmethod
    def of_scores(cls, scores: Sequence[float], clusters: Sequence[str], *name: object, seed: int = 0) -> Estimate:
        """The mean score of one task under one arm."""
        binary = set(scores) <= {0.0, 1.0} and len(set(clusters)) == len(clusters)
        return cls([Stratum.of(scores, clusters)], (0.0, 1.0), name, seed, binary=binary)

    @property
    def mean(self) -> float:
        return mean_over(self.strata)

    @property
    def n(self) -> int:
        return sum(stratum.n for stratum in self.strata)

    @property
    def rule(self) -> Rule:
        """Which of the rules above applies."""
        if min(stratum.n_clusters for stratum in self.strata) < MIN_CLUSTERS:
            return "none"
        if self.binary:
            return "wilson"
        if self.pairs is not None:
            return "tango"
        return "bounded" if sum(stratum.n_changed for stratum in self.strata) < MIN_CHANGED else "bootstrap"

    def interval(self, confidence: float = 0.95) -> Interval:
        """The two-sided interval at this confidence."""
        if self.rule == "none":
            return Interval(None, None)
        low, high = self._ends(self.rule, confidence)
        return Interval(min(low, self.mean), max(high, self.mean))

    def lower_bound(self, tail: float = 0.05) -> float | None:
        """The one-sided bound that the mean falls below with this probability, as a claim of no loss needs it."""
        rule = self._claim_rule
        if rule == "none":
            return None
        low = self._ends(rule, 1 - 2 * tail)[0]
        if rule == "bootstrap":
            assert self._bootstrap is not None
            low = min(low, self._bootstrap.interval(1 - 2 * tail, "bca")[0])
        return min(low, self.mean)

    def p_no_loss(self, margin: float) -> float | None:
        """p of "the loss is the margin or more": the smallest tail whose lower bound is still above minus the margin.

        None where there is no bound; 1 where even the bound of one half is not above it. It is never smaller than the draws
        of a resampling method can tell.

        Raises:
            ValueError: the margin is not positive.
        """
        if margin <= 0:
            raise ValueError(f"a margin of {margin} shows nothing; it must be positive")
        if self._claim_rule == "none":
            return None
        shown = 0.5
        if not self._shows(margin, shown):
            return 1.0
        open_below = 0.0
        for _ in range(_HALVINGS):
            middle = (open_below + shown) / 2
            if self._shows(margin, middle):
                shown = middle
            else:
                open_below = middle
        return shown

    @property
    def _claim_rule(self) -> Rule:
        few = sum(stratum.n_clusters for stratum in self.strata) < MIN_CLAIMED
        return "bounded" if self.rule == "bootstrap" and few else self.rule

    def _shows(self, margin: float, tail: float) -> bool:
        bound = self.lower_bound(tail)
        draws = {"bounded": self._bounded, "bootstrap": self._bootstrap}.get(self._claim_rule)
        return bound is not None and bound > -margin and (draws is None or draws.resolves(tail))

    def _ends(self, rule: Rule, confidence: float) -> tuple[float, float]:
        if rule == "wilson":
            return wilson(float(self.strata[0].sums.sum()), self.strata[0].n, confidence)
        if rule == "tango":
            assert self.pairs is not None
            return tango(self.pairs.lost, self.pairs.gained, len(self.pairs), confidence)
        if rule == "bounded":
            if self._bounded is None:
                self._bounded = Bounded.of(self.strata, self.bounds, self._generator(), n_draws=self.n_resamples)
            return self._bounded.interval(confidence)
        if self._bootstrap is None:
            self._bootstrap = Bootstrap.of(self.strata, self._generator(), n_resamples=self.n_resamples)
        return self._bootstrap.interval(confidence, self.method)

    def _generator(self) -> np.random.Generator:
        return generator(self.seed, *self.name)
