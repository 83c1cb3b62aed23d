"""An interval for a mean of which (almost) nothing was seen to vary.

Ten samples with ten times the same difference do not show that the eleventh is the same; a bootstrap of them has no width
and says just that. What is certain is the range of the values. Gaffke's bound uses it: weigh the seen clusters by a
Dirichlet(1, ..., 1) draw and give one unseen cluster, at the worst end of the range, its share. For zero changes among n
it is exactly Clopper and Pearson's 1 - alpha^(1/n), which the rule of three approximates.

Source: Gaffke (2005), in the form of Learned-Miller and Thomas (arXiv 1905.06208) and Phan, Thomas and Learned-Miller
(ICML 2021, "Towards Practical Mean Bounds for Small Samples").

Several strata share one unseen cluster: if nothing varied in k strata of n clusters, then by the inequality of arithmetic
and geometric means the average chance of a change is bounded as if k n clusters of one stratum had been seen. With unequal
n the smallest counts for all, since a change could hide there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvpress_eval.statistics.strata import Array, Stratum


@dataclass(frozen=True)
class Bounded:
    """Draws of the mean with the unseen cluster at the low and at the high end of the range, each (n_draws,) and sorted."""

    lowest: Array
    highest: Array

    @classmethod
    def of(
        cls,
        strata: Sequence[Stratum],
        bounds: tuple[float, float],
        rng: np.random.Generator,
        *,
        n_draws: int = 10_000,
    ) -> Bounded:
        """Draw for the mean over strata of values within `bounds`."""
        seen: Array = np.zeros(n_draws)
        for stratum in strata:
            weights = rng.standard_exponential((n_draws, stratum.n_clusters))
            seen += (weights @ stratum.sums) / (weights @ stratum.sizes) / len(strata)
        n_seen = len(strata) * min(stratum.n_clusters for stratum in strata)
        # evenly spaced, so that the case without any change comes out exact; shuffled against `seen`
        uniform = rng.permutation((np.arange(n_draws) + 0.5) / n_draws)
        unseen = 1 - (1 - uniform) ** (1 / n_seen)
        return cls(np.sort(seen + unseen * (bounds[0] - seen)), np.sort(seen + unseen * (bounds[1] - seen)))

    def interval(self, confidence: float) -> tuple[float, float]:
        """Lower and upper end of the two-sided interval."""
        tail = (1 - confidence) / 2
        return float(np.quantile(self.lowest, tail)), float(np.quantile(self.highest, 1 - tail))

    def resolves(self, tail: float) -> bool:
        """Whether there are draws enough to know a bound that is passed with this probability."""
        return tail >= 1 / len(self.lowest)
