"""Margins and deltas of cells, in points (0 to 100), and the class of such a value.

margin m_c = FullKV - host, delta_c = arm - host (arXiv 2605.08234 section 2). A value is positive, a tie or negative;
on benchmarks of right-or-wrong items ties are common, and calling them "nonpositive" counts them as evidence that the
arm does harm. The published binary grouping, H > 0 against H <= 0, is there under its own names: "favourable" cells
have a positive margin, "unfavourable" ones a tie or a negative one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpress.errors import InputError
from kvpress_eval.diagnostic.cells import Array, Cell
from kvpress_eval.records import FULL
from kvpress_eval.statistics.strata import Stratum

#: a comparison: the score of the first contract minus that of the second
Comparison = tuple[str, str]
POSITIVE, TIE, NEGATIVE = 1, 0, -1


def difference(cell: Cell, comparison: Comparison) -> Stratum:
    """Score of the first contract minus the second, in points, summed by cluster.

    Raises:
        InputError: the cell lacks one of the contracts.
    """
    for name in comparison:
        if name not in cell.scores:
            known = ", ".join(f"'{given}'" for given in sorted(cell.scores))
            raise InputError(f"task '{cell.key.task}' has no scores of contract '{name}'; use one of {known}")
    first, second = comparison
    return Stratum.of(cell.scores[first] - cell.scores[second], cell.clusters)


def margin(cell: Cell, host: str) -> float:
    """Full cache minus host. With another baseline in the host's place it is that surface's own margin."""
    return difference(cell, (FULL, host)).mean


def delta(cell: Cell, host: str, arm: str) -> float:
    """Arm minus host."""
    return difference(cell, (arm, host)).mean


def classes(values: Array, tolerance: float) -> NDArray[np.int8]:
    """+1 above `tolerance`, -1 below minus it, 0 between: a tie."""
    return ((values > tolerance).astype(np.int8) - (values < -tolerance).astype(np.int8)).astype(np.int8)


def is_favourable(margins: Array, tolerance: float) -> NDArray[np.bool_]:
    """The published binary grouping: True for H > 0, False for H <= 0, ties included."""
    return margins > tolerance
