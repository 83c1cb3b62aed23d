"""Budgets, and how the allocations spread them over layers and heads: the published formulas, coded a second time."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpress.errors import ContractError
from kvpress.slots import Allocation, Budget
from kvpress.slots.allocation import Candidates, round_to_sum
from kvpress.slots.budget import Unit

ANY = settings(max_examples=60, deadline=None)


def candidates(
    n_heads: int, n_units: int, seed: int = 0, unit: int = 1, n_free: int | None = None, lengths=None
) -> Candidates:
    """Random scores; the last unit is short where units are blocks. `lengths`: units that a head still has."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(n_heads, n_units, generator=draw, dtype=torch.float64)
    sizes = torch.full((n_heads, n_units), unit)
    if unit > 1:
        sizes[:, -1] = 1
    eligible = torch.arange(n_units)[None] < torch.tensor(lengths or [n_units] * n_heads)[:, None]
    return Candidates(scores, sizes, eligible, int(sizes[0].sum()) if n_free is None else n_free)


def every_layer(allocation: Allocation, base: int, layers: list[Candidates]) -> list[list[int]]:
    """Layer by layer, as the cache asks, or all at once where the allocation needs that."""
    if allocation.needs_all_layers:
        return allocation.model(base, layers)
    return [allocation.layer(base, c, index, len(layers)) for index, c in enumerate(layers)]


# --- budgets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percent", range(1, 101))
def test_fraction_is_the_floor_of_its_exact_value(percent):
    """k = floor(b T) (arXiv 2605.08234 section 2); 0.29 x 100 must not become 28 because of binary fractions."""
    budget = Budget.parse({"kind": "fraction", "value": percent / 100})
    assert budget.keeps_everything == (percent == 100)
    for n in (*range(1, 210), 1000, 8192, 131_072):
        assert budget.tokens_per_head(n, 4, Unit(1, 100)) == math.floor(Fraction(percent, 100) * n)


def test_tokens_are_capped_at_the_prompt():
    budget = Budget.parse({"kind": "tokens", "value": 64})
    assert [budget.tokens_per_head(n, 4, Unit(1, 100)) for n in (10, 64, 1000)] == [10, 64, 64]


@ANY
@given(value=st.integers(1, 10**7), heads=st.integers(1, 64), token=st.integers(1, 600), n=st.integers(1, 5000))
def test_bytes_are_never_exceeded(value, heads, token, n):
    budget = Budget.parse({"kind": "bytes", "value": value})
    if value < heads * token:
        with pytest.raises(ContractError, match="holds nothing: one token"):
            budget.tokens_per_head(n, heads, Unit(1, token))
        return
    tokens = budget.tokens_per_head(n, heads, Unit(1, token))
    assert tokens * heads * token <= value
    assert tokens == n or (tokens + 1) * heads * token > value


@ANY
@given(
    value=st.integers(1, 10**7), heads=st.integers(1, 64), page=st.sampled_from([16, 32, 64]), even=st.booleans(),
    n=st.integers(1, 5000), data=st.data(),
)  # fmt: skip
def test_bytes_in_pages_are_never_exceeded(value, heads, page, even, n, data):
    """Heads of equal length fill whole pages; heads of any lengths with the same mean stay within the bytes too."""
    unit = Unit(page, page * 100 + 12, 0 if even else page - 1)
    budget = Budget.parse({"kind": "bytes", "value": value})
    if value < heads * unit.nbytes * (1 if even else 2):
        if value < heads * unit.nbytes:
            with pytest.raises(ContractError, match=f"one page of {page} tokens"):
                budget.tokens_per_head(n, heads, unit)
        return
    tokens = budget.tokens_per_head(n, heads, unit)
    lengths = [tokens] * heads
    if not even and heads > 1:
        moved = data.draw(st.integers(0, tokens))
        lengths[0], lengths[1] = tokens - moved, tokens + moved
    assert sum(-(-length // page) for length in lengths) * unit.nbytes <= value


# --- uniform, pyramid --------------------------------------------------------------------------------------------


def test_uniform_gives_every_head_the_same():
    assert every_layer(Allocation.parse("uniform"), 7, [candidates(3, 20)] * 2) == [[7] * 3] * 2


@ANY
@given(
    base=st.integers(0, 300),
    spare=st.integers(0, 700),
    n_layers=st.integers(2, 40),
    beta=st.sampled_from([1, 2, 14, 20, 100]),
)
def test_pyramid_is_linear_between_its_two_ends(base, spare, n_layers, beta):
    """arXiv 2406.02069 eq. 2-3: k_last = k / beta, k_first = 2 k - k_last, k_l = k_first - l (k_first - k_last)/(m - 1).

    As in the authors' code (pyramidkv_utils.py) the first layer is capped at the prompt, and the last gets the rest.
    Budgets are whole tokens, so each may differ from the line by less than one; their sum is exact.
    """
    n_free = base + spare
    last = Fraction(base, beta)
    first = 2 * base - last
    if first > n_free:
        first, last = Fraction(n_free), Fraction(2 * base - n_free)
    line = [first - (first - last) * Fraction(index, n_layers - 1) for index in range(n_layers)]
    layers = [candidates(2, 4, n_free=n_free)] * n_layers
    found = every_layer(Allocation.parse({"kind": "pyramid", "beta": beta}), base, layers)
    assert all(heads[0] == heads[1] for heads in found)
    assert all(abs(heads[0] - exact) < 1 for heads, exact in zip(found, line, strict=True))
    assert sum(heads[0] for heads in found) == base * n_layers
    assert all(0 <= heads[0] <= n_free for heads in found)


def test_pyramid_keeps_its_sum_when_layers_hold_different_numbers_of_tokens():
    """Each layer asks by itself, after earlier evictions: what it holds must not change what the others get."""
    layers = [candidates(2, units, n_free=500) for units in (190, 150, 100, 60, 20)]
    found = every_layer(Allocation.parse("pyramid"), 100, layers)
    assert sum(heads[0] for heads in found) == 500
    assert found[0][0] == 195
    assert found[-1][0] == 5


def test_pyramid_with_one_layer():
    assert every_layer(Allocation.parse("pyramid"), 9, [candidates(2, 20)]) == [[9, 9]]


# --- Ada-KV, global ----------------------------------------------------------------------------------------------


def winners(scores: list[list[float]], total: int) -> list[int]:
    """B*: how many of the `total` largest scores each head has (arXiv 2407.11550 Algorithm 1, lines 3-5)."""
    flat = sorted(((-s, head, at) for head, row in enumerate(scores) for at, s in enumerate(row)))[:total]
    return [sum(head == owner for _, owner, _ in flat) for head in range(len(scores))]


@ANY
@given(
    seed=st.integers(0, 10**6),
    n_heads=st.integers(1, 5),
    n_units=st.integers(1, 40),
    share=st.floats(0, 1),
    floor=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
)
def test_ada_is_algorithm_1(seed, n_heads, n_units, share, floor):
    """B_i = floor * B / h + (1 - floor) * B*_i, in whole tokens whose sum is exactly B."""
    base, c = int(share * n_units), candidates(n_heads, n_units, seed)
    counts = winners(c.scores.tolist(), base * n_heads)
    found = Allocation.parse({"kind": "ada", "floor": floor}).layer(base, c, 0, 1)
    assert sum(found) == base * n_heads
    for got, count in zip(found, counts, strict=True):
        assert abs(got - (floor * base + (1 - floor) * count)) < 1
        assert 0 <= got <= n_units
    if floor == 0:
        assert found == counts


def test_ada_by_hand():
    scores = torch.tensor([[9.0, 8.0, 7.0, 1.0], [6.0, 2.0, 2.0, 2.0]])
    c = Candidates(scores, torch.ones(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool), 4)
    # B = 4: the largest four are 9 8 7 6, so B* = (3, 1); floor 0.5: 0.5 * 2 + 0.5 * (3, 1) = (2.5, 1.5) -> (3, 1)
    assert Allocation.parse({"kind": "ada", "floor": 0.0}).layer(2, c, 0, 1) == [3, 1]
    assert Allocation.parse({"kind": "ada", "floor": 0.5}).layer(2, c, 0, 1) == [3, 1]
    assert Allocation.parse({"kind": "ada", "floor": 1.0}).layer(2, c, 0, 1) == [2, 2]


def test_protected_units_do_not_compete():
    c = candidates(2, 10)
    eligible = c.eligible.clone()
    eligible[0, :8] = False
    scores = c.scores.clone()
    scores[0, :8] = 100
    found = Allocation.parse({"kind": "ada", "floor": 0.0}).layer(3, Candidates(scores, c.sizes, eligible, 10), 0, 1)
    expected = winners([scores[0, 8:].tolist(), scores[1].tolist()], 6)
    assert found == expected


@ANY
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), floor=st.sampled_from([0.0, 0.3]), n_layers=st.integers(1, 3))
def test_global_is_one_competition_over_all_layers(seed, share, floor, n_layers):
    """arXiv 2505.23416 (non-uniform) and 2605.07234: one top-k over all heads of all layers."""
    n_heads, n_units = 2, 12
    base = int(share * n_units)
    layers = [candidates(n_heads, n_units, seed + index) for index in range(n_layers)]
    counts = winners([row for c in layers for row in c.scores.tolist()], base * n_heads * n_layers)
    found = [
        n for heads in every_layer(Allocation.parse({"kind": "global", "floor": floor}), base, layers) for n in heads
    ]
    assert sum(found) == base * n_heads * n_layers
    assert all(abs(got - (floor * base + (1 - floor) * count)) < 1 for got, count in zip(found, counts, strict=True))


@ANY
@given(
    seed=st.integers(0, 10**6),
    unit=st.integers(1, 8),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    base=st.integers(0, 80),
    floor=st.sampled_from([0.0, 0.2, 1.0]),
    kind=st.sampled_from(["ada", "global"]),
)
def test_competition_never_spends_more_than_the_budget(seed, unit, lengths, base, floor, kind):
    """Blocks with a short last one and heads of different lengths included; no head gets less than nothing."""
    c = candidates(len(lengths), 9, seed, unit, lengths=lengths)
    (found,) = every_layer(Allocation.parse({"kind": kind, "floor": floor}), base, [c])
    assert len(found) == len(lengths)
    assert sum(found) <= base * len(lengths)
    assert min(found) >= 0


# --- budgets from a file -----------------------------------------------------------------------------------------


@ANY
@given(
    weights=st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=1, max_size=4),
    base=st.integers(0, 200),
)
def test_calibrated_weights_are_scaled_to_the_budget(weights, base):
    total = sum(sum(row) for row in weights)
    if total < 1e-3:
        return
    layers = [candidates(3, 300)] * len(weights)
    found = every_layer(Allocation.parse({"kind": "file", "weights": weights}), base, layers)
    tokens = base * 3 * len(weights)
    assert sum(sum(heads) for heads in found) == tokens
    for heads, row in zip(found, weights, strict=True):
        assert all(abs(got - w * tokens / total) < 1 + 1e-6 for got, w in zip(heads, row, strict=True))


def test_weights_for_another_model_are_refused():
    allocation = Allocation.parse({"kind": "file", "weights": [[1, 2], [3, 4]]})
    with pytest.raises(ContractError, match="2 layers x 2 KV heads"):
        allocation.layer(5, candidates(3, 10), 0, 2)


@ANY
@given(st.lists(st.floats(0, 50), min_size=1, max_size=20), st.data())
def test_rounding_is_exact_and_moves_nobody_by_a_token(exact, data):
    """For any total that the exact shares can be rounded to."""
    lowest, highest = sum(math.floor(x) for x in exact), sum(math.ceil(x) for x in exact)
    total = data.draw(st.integers(lowest, highest))
    found = round_to_sum(exact, total)
    assert abs(sum(found) - total) <= sum(x != round(x) and abs(x - round(x)) < 1e-8 for x in exact)
    assert all(abs(got - x) <= 1 + 1e-8 for got, x in zip(found, exact, strict=True))
