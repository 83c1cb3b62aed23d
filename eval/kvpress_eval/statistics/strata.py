"""One task's values, summed by cluster: what every resampling method works on."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Stratum:
    """sums (n_clusters,): sum of the values of each cluster; sizes (n_clusters,): how many values it has."""

    sums: Array
    sizes: Array

    @classmethod
    def of(cls, values: Iterable[float], clusters: Iterable[Hashable]) -> Stratum:
        """Group values by cluster; clusters keep the order of their first value."""
        groups: dict[Hashable, list[float]] = {}
        for value, cluster in zip(values, clusters, strict=True):
            groups.setdefault(cluster, []).append(value)
        sums = np.array([sum(group) for group in groups.values()], dtype=np.float64)
        return cls(sums, np.array([len(group) for group in groups.values()], dtype=np.float64))

    @property
    def n_clusters(self) -> int:
        return len(self.sums)

    @property
    def n(self) -> int:
        return int(self.sizes.sum())

    @property
    def mean(self) -> float:
        """Mean over values, not over clusters: a cluster counts by its size."""
        return float(self.sums.sum() / self.sizes.sum())

    @property
    def influence(self) -> Array:
        """(n_clusters,) first-order effect of each cluster on the mean; their mean is 0."""
        return np.asarray((self.sums - self.mean * self.sizes) / self.sizes.mean(), dtype=np.float64)

    @property
    def variance(self) -> float:
        """Variance of the mean by linearisation, without correction for few clusters: what a bootstrap converges to."""
        return float((self.influence**2).sum() / self.n_clusters**2)

    @property
    def n_changed(self) -> int:
        """Clusters whose mean differs from the most common one."""
        _, counts = np.unique(np.round(self.sums / self.sizes, 9), return_counts=True)
        return self.n_clusters - int(counts.max())


def mean_over(strata: Sequence[Stratum]) -> float:
    """The macro average: every stratum counts the same, however many items it has."""
    return float(np.mean([stratum.mean for stratum in strata]))


def generator(seed: int, *names: object) -> np.random.Generator:
    """A random generator of its own for whatever is named, so that a report does not depend on the order of its parts."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest[:16], dtype=np.uint32).tolist()])
