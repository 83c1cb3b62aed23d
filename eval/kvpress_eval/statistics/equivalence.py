"""Verdicts: "no loss" is a claim that needs evidence, and p > 0.05 is none.

Non-inferiority against a margin that was fixed before the run: "no loss" rejects "the loss is the margin or more" at 5 %, for
one comparison the same as a one-sided 95 % lower bound above minus the margin. Many comparisons are made side by side, and
of many arms exactly at the margin some would pass; so its p is adjusted as that of a loss is. This is the lower half of
the two one-sided tests (Schuirmann 1987, "A comparison of the two one-sided tests procedure and the power approach"); the
upper half is left out because to be better than the full cache is no fault.
"""

from __future__ import annotations

from typing import Literal

Verdict = Literal["no loss", "loss", "undecided"]

SIGNIFICANCE = 0.05


def verdict(difference: float, upper: float | None, p_loss: float | None, p_no_loss: float | None) -> Verdict:
    """What a difference, arm minus full, shows.

    "no loss": any loss is smaller than the margin. "loss": the arm is worse, by its two-sided 95 % interval and by its p, and
    the loss is not shown to be within the margin. "undecided": neither; not "equal".

    upper: end of the two-sided 95 % interval. p_loss: of "arm and full cache are exchangeable"; p_no_loss: of "the loss is
    the margin or more" (`Estimate.p_no_loss`). Both adjusted for the comparisons made beside this one, None where there is
    no test.
    """
    if p_no_loss is not None and p_no_loss < SIGNIFICANCE:
        return "no loss"
    below_zero = difference < 0 and upper is not None and upper < 0
    if below_zero and p_loss is not None and p_loss < SIGNIFICANCE:
        return "loss"
    return "undecided"
