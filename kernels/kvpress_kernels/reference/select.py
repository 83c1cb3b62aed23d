"""The best units of every row under budgets of the rows' own."""

from __future__ import annotations

import torch
from torch import Tensor


def select(scores: Tensor, budgets: Tensor, eligible: Tensor) -> Tensor:
    """Mask [R, U] of the budgets[r] best eligible units of each row r; earlier units on ties.

    scores: [R, U], any float dtype. budgets: [R] integers; a row with fewer eligible units keeps all of them, a budget
    of 0 or less keeps none. eligible: [R, U] bool. One stable sort for all rows, and no wait for the device. Whether a
    unit is eligible is not told by its score, so that a score of -inf is still better than no unit.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    candidate = eligible.gather(1, order)
    chosen = candidate & (candidate.cumsum(1) <= budgets[:, None])
    return torch.zeros_like(eligible).scatter_(1, order, chosen)
