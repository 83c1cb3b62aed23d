"""The sign-flip test of paired differences, by cluster."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvpress_eval.statistics.strata import Array, Stratum

N_FLIPS = 10_000
#: with so many clusters or fewer that are not zero, all 2^n patterns of signs are counted
_EXACT_UP_TO = 13
_TOLERANCE = 1e-12


def sign_flip(strata: Sequence[Stratum], rng: np.random.Generator, *, n_flips: int = N_FLIPS) -> float:
    """Two-sided p of "arm and full cache are exchangeable", for the mean of differences over strata.

    A cluster's differences change sign together. All patterns are counted if there are few, otherwise `n_flips` random
    ones and the seen one, (hits + 1) / (n_flips + 1) (Phipson and Smyth 2010, arXiv 1603.05766).
    """
    effects = np.concatenate([stratum.sums / stratum.sizes.sum() for stratum in strata])
    effects = effects[np.abs(effects) > _TOLERANCE]
    observed = abs(float(effects.sum())) - _TOLERANCE
    if len(effects) <= _EXACT_UP_TO:
        return float(np.mean(np.abs(_all_flips(effects)) >= observed))
    signs = rng.integers(0, 2, size=(n_flips, len(effects)), dtype=np.int8) * 2 - 1
    return (int(np.sum(np.abs(signs @ effects) >= observed)) + 1) / (n_flips + 1)


def _all_flips(effects: Array) -> Array:
    totals: Array = np.zeros(1)
    for effect in effects:
        totals = np.concatenate([totals + effect, totals - effect])
    return totals
