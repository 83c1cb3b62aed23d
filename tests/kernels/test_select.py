"""Selection under budgets, against a sort in plain Python and the rule of one row at a time."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpress.slots.retention import best
from kvpress_kernels.reference.select import select


def by_hand(scores: list[float], budget: int, eligible: list[bool]) -> list[bool]:
    """The budget best eligible units; Python's sort is stable, so earlier units win ties."""
    units = sorted((unit for unit in range(len(scores)) if eligible[unit]), key=lambda unit: -scores[unit])
    return [unit in units[: max(budget, 0)] for unit in range(len(scores))]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_scores(data):
    n_rows, n_units = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 12))
    # few different scores, so that ties are common
    score = st.sampled_from([0.0, 0.5, 1.0, -1.0, math.inf, -math.inf])
    row = st.lists(score, min_size=n_units, max_size=n_units)
    scores = data.draw(st.lists(row, min_size=n_rows, max_size=n_rows))
    flags = st.lists(st.booleans(), min_size=n_units, max_size=n_units)
    eligible = data.draw(st.lists(flags, min_size=n_rows, max_size=n_rows))
    budgets = data.draw(st.lists(st.integers(-1, n_units + 2), min_size=n_rows, max_size=n_rows))
    found = select(
        torch.tensor(scores).reshape(n_rows, n_units),
        torch.tensor(budgets, dtype=torch.int32),
        torch.tensor(eligible, dtype=torch.bool).reshape(n_rows, n_units),
    )
    assert found.dtype == torch.bool
    assert found.tolist() == [by_hand(*row) for row in zip(scores, budgets, eligible, strict=True)]


def test_rows_are_what_retention_chooses_one_by_one():
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (5, 40), generator=draw).float()  # many ties
    eligible = torch.rand(5, 40, generator=draw) < 0.7
    budgets = torch.tensor([0, 3, 10, 27, 40])
    expected = [best(*row) for row in zip(scores, eligible, budgets.tolist(), strict=True)]
    assert torch.equal(select(scores, budgets, eligible), torch.stack(expected))


def test_earlier_units_win_ties():
    found = select(
        torch.zeros(2, 5), torch.tensor([2, 3]), torch.tensor([[True] * 5, [False, True, True, False, True]])
    )
    assert found.int().tolist() == [[1, 1, 0, 0, 0], [0, 1, 1, 0, 1]]


def test_half_precision_scores():
    scores = torch.tensor([[0.1, 0.3, 0.2]])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert select(scores.to(dtype), torch.tensor([2]), torch.ones(1, 3, dtype=torch.bool)).tolist() == [
            [False, True, True]
        ]
