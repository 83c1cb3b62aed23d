"""Verdicts: "no loss" is a claim that needs evidence, and p > 0.05 is none.

Non-inferiority against a margin that was fixed before the run: "no loss" only if the one-sided 95 % lower bound of the
difference (the lower end of the two-sided 90 % interval) is above minus the margin. This is the lower half of the two
one-sided tests (Schuirmann 1987, "A comparison of the two one-sided tests procedure and the power approach"), each at 5 %;
the upper half is left out because to be better than the full cache is no fault.
"""

from __future__ import annotations

from typing import Literal

Verdict = Literal["no loss", "loss", "undecided"]

#: of the two-sided interval whose lower end is the one-sided 95 % bound
CONFIDENCE = 0.90
SIGNIFICANCE = 0.05


def verdict(
    difference: float, lower: float | None, upper: float | None, p_adjusted: float | None, margin: float
) -> Verdict:
    """What a difference, arm minus full, shows.

    "no loss": any loss is smaller than the margin. "loss": the arm is worse, by its two-sided 95 % interval and by a p
    adjusted for the comparisons made beside it, and the loss is not shown to be within the margin. "undecided": neither;
    not "equal".

    lower: one-sided 95 % bound; upper: upper end of the two-sided 95 % interval; None where there is no interval.
    p_adjusted: None where there is no test.

    Raises:
        ValueError: the margin is not positive.
    """
    if margin <= 0:
        raise ValueError(f"a margin of {margin} shows nothing; it must be positive")
    if lower is not None and lower > -margin:
        return "no loss"
    below_zero = difference < 0 and upper is not None and upper < 0
    if below_zero and p_adjusted is not None and p_adjusted < SIGNIFICANCE:
        return "loss"
    return "undecided"
