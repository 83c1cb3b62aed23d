"""Evidence statistics against a brute force that loops over queries, heads and units and really removes each unit.

The definitions are those of arXiv 2605.08234 eq. 11: attention is the softmax over the tokens that a query may see
(and a learned sink of value 0), a unit's mass is its share, and MII is the squared change of the output when the unit
is taken out and the softmax is computed again over what remains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvpress_kernels.reference import window_scores as module
from kvpress_kernels.reference.window_scores import attention_probs, change, unit_vectors, window_scores

ALL = ("mass", "mass_squared", "coverage", "change@0", "change@1", "change@0.5")


@dataclass(frozen=True)
class Case:
    """Inputs of `window_scores`; `blocks` are the token indices of each unit, None for single tokens."""

    query: Tensor
    keys: Tensor
    values: Tensor
    query_positions: Tensor
    key_positions: Tensor
    weights: Tensor
    scale: float = 0.4
    blocks: list[list[int]] | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    basis: Tensor | None = None

    @property
    def units(self) -> list[list[int]]:
        return self.blocks if self.blocks is not None else [[i] for i in range(self.keys.shape[1])]

    def run(self, statistics: tuple[str, ...] = ALL, reducer: str = "sum") -> dict[str, Tensor]:
        return window_scores(
            self.query, self.keys, self.values, self.query_positions, self.key_positions, self.weights,
            scale=self.scale, statistics=statistics, unit_slots=self.unit_slots, reducer=reducer,
            softcap=self.softcap, sinks=self.sinks, value_basis=self.basis,
        )  # fmt: skip

    @property
    def unit_slots(self) -> Tensor | None:
        if self.blocks is None:
            return None
        longest = max(len(block) for block in self.blocks)
        return torch.tensor([block + [-1] * (longest - len(block)) for block in self.blocks])

    def as_dtype(self, dtype: torch.dtype) -> Case:
        return replace(self, query=self.query.to(dtype), keys=self.keys.to(dtype), values=self.values.to(dtype))


def make(
    seed: int = 0, heads: int = 2, group: int = 2, n_queries: int = 4, n_keys: int = 9, dim: int = 5, **more
) -> Case:
    """Random inputs in float64; the queries sit in the last positions, so most see only a part of the keys."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    case = Case(
        query=2 * normal(heads, group, n_queries, dim),
        keys=normal(heads, n_keys, dim),
        values=normal(heads, n_keys, dim - 1),
        query_positions=torch.arange(n_keys - n_queries, n_keys),
        key_positions=torch.arange(n_keys),
        weights=torch.rand(n_queries, generator=draw, dtype=torch.float64) + 0.1,
    )
    return replace(case, **more)


def softmax_output(
    logits: list[float], values: list[Tensor], sink: float | None
) -> tuple[list[float], float, Tensor | None]:
    """Shares of the tokens, share of the sink, and output of one softmax; no output where there is nothing to attend to."""
    every = logits if sink is None else [*logits, sink]
    if not every:
        return [], 0.0, None
    exps = [math.exp(x - max(every)) for x in every]
    shares = [e / math.fsum(exps) for e in exps]
    tokens, nothing = (shares, 0.0) if sink is None else (shares[:-1], shares[-1])
    output = sum((p * v for p, v in zip(tokens, values, strict=True)), torch.zeros(()))
    return tokens, nothing, output


def brute_force(case: Case, reducer: str = "sum") -> dict[str, Tensor]:
    """The statistics by their definitions, one query, head and unit at a time, in float64."""
    case = case.as_dtype(torch.float64)
    n_heads, group, n_queries, _ = case.query.shape
    result = {name: torch.zeros(n_heads, group, len(case.units), dtype=torch.float64) for name in ALL}
    for h in range(n_heads):
        for g in range(group):
            values = case.values[h] if case.basis is None else case.values[h] @ case.basis[h, g].double()
            sink = None if case.sinks is None else float(case.sinks[h, g])
            for u in range(n_queries):
                weight = float(case.weights[u])
                if weight == 0:
                    continue
                seen = [i for i, at in enumerate(case.key_positions.tolist()) if at <= int(case.query_positions[u])]
                logit = {i: float(case.query[h, g, u] @ case.keys[h, i]) * case.scale for i in seen}
                if case.softcap is not None:
                    logit = {i: case.softcap * math.tanh(x / case.softcap) for i, x in logit.items()}
                probs, nothing, output = softmax_output(list(logit.values()), [values[i] for i in seen], sink)
                for c, unit in enumerate(case.units):
                    inside = [i for i in unit if i in logit]
                    mass = math.fsum(p for i, p in zip(seen, probs, strict=True) if i in unit)
                    left = math.fsum(p for i, p in zip(seen, probs, strict=True) if i not in unit) + nothing
                    rest = [i for i in seen if i not in unit]
                    _, _, without = softmax_output([logit[i] for i in rest], [values[i] for i in rest], sink)
                    moved = 0.0 if output is None or without is None else float((without - output).square().sum())
                    found = {
                        "mass": mass,
                        "mass_squared": mass**2,
                        "coverage": float(bool(inside) and mass > (1 + 1e-6) * len(inside) / len(seen)),
                        "change@1": moved,
                        "change@0.5": moved * left,
                        "change@0": moved * left**2,
                    }
                    for name, value in found.items():
                        at = result[name]
                        at[h, g, c] = (
                            max(float(at[h, g, c]), value) if reducer == "max" else at[h, g, c] + weight * value
                        )
    return result


def check(case: Case, reducer: str = "sum", rtol: float = 1e-9, atol: float = 1e-12) -> None:
    expected, found = brute_force(case, reducer), case.run(reducer=reducer)
    for name in ALL:
        torch.testing.assert_close(
            found[name].double(), expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


BLOCKS = [[0, 1, 2, 3], [4, 5, 6, 7], [8]]  # the last one is short
GAPS = [[0, 3], [1], [4, 5, 6], [8]]  # units of a cache that has been evicted from; tokens 2 and 7 belong to none


@pytest.mark.parametrize("blocks", [None, BLOCKS, GAPS], ids=["tokens", "blocks", "gaps"])
@pytest.mark.parametrize("reducer", ["sum", "max"])
def test_every_statistic(blocks, reducer):
    check(make(blocks=blocks), reducer)


@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["tokens", "blocks"])
def test_learned_sinks_join_the_denominator_with_value_zero(blocks):
    check(make(sinks=torch.tensor([[0.5, -1.0], [2.0, 0.0]]), blocks=blocks))


@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["tokens", "blocks"])
def test_softcap(blocks):
    check(make(softcap=1.5, blocks=blocks))


@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["tokens", "blocks"])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_change_is_measured_in_the_basis_of_each_query_head(blocks, with_sinks):
    draw = torch.Generator().manual_seed(5)
    basis = torch.randn(2, 2, 4, 7, generator=draw, dtype=torch.float64)
    check(make(basis=basis, blocks=blocks, sinks=torch.zeros(2, 2) if with_sinks else None))


@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["tokens", "blocks"])
def test_queries_in_the_middle_see_only_what_is_before_them(blocks):
    case = make(n_queries=3, query_positions=torch.tensor([1, 5, 4]), blocks=blocks)
    check(case)
    assert bool((case.run()["mass"][..., -1] == 0).all())


def test_positions_with_gaps_after_an_eviction():
    check(
        make(key_positions=torch.tensor([0, 1, 4, 5, 9, 10, 11, 20, 21]), query_positions=torch.tensor([3, 10, 20, 21]))
    )


def test_queries_of_weight_zero_are_skipped():
    """Also where such a query holds garbage: it is not evidence at all."""
    case = make()
    weights = case.weights.clone()
    weights[1] = 0
    query = case.query.clone()
    query[:, :, 1] = float("nan")
    for reducer in ("sum", "max"):
        check(replace(case, weights=weights), reducer)
        found = replace(case, weights=weights, query=query).run(reducer=reducer)
        assert all(bool(value.isfinite().all()) for value in found.values())


def test_max_ignores_the_size_of_the_weights():
    case = make()
    other = replace(case, weights=case.weights * torch.tensor([3.0, 0.1, 7.0, 1.0], dtype=torch.float64))
    for name, value in case.run(reducer="max").items():
        assert torch.equal(value, other.run(reducer="max")[name])


@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["tokens", "blocks"])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_that_see_nothing_give_zeros(blocks, with_sinks):
    sinks = torch.zeros(2, 2) if with_sinks else None
    blind = make(key_positions=torch.arange(10, 19), query_positions=torch.arange(4), blocks=blocks, sinks=sinks)
    mixed = replace(blind, query_positions=torch.tensor([2, 12, 9, 30]))
    for reducer in ("sum", "max"):
        assert all(bool((value == 0).all()) for value in blind.run(reducer=reducer).values())
        check(mixed, reducer)


@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["tokens", "blocks"])
def test_a_unit_that_is_all_a_query_sees_has_no_output_change(blocks):
    """Nothing remains to compare with; its displacement g is 0."""
    case = make(n_queries=1, query_positions=torch.tensor([0]), blocks=blocks)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = case.as_dtype(dtype).run()
        assert float(found["mass"].max()) == pytest.approx(float(case.weights[0]))
        assert float(found["change@1"].abs().max()) == 0
        assert float(found["change@0"].abs().max()) == 0


@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["tokens", "blocks"])
@pytest.mark.parametrize("reducer", ["sum", "max"])
def test_chunks_do_not_change_the_result(monkeypatch, blocks, reducer):
    draw = torch.Generator().manual_seed(6)
    basis = torch.randn(3, 2, 4, 4, generator=draw, dtype=torch.float64)
    case = make(heads=3, n_queries=5, blocks=blocks, basis=basis, sinks=torch.zeros(3, 2))
    whole = case.run(reducer=reducer)
    for elements in (1, 40, 150):
        monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", elements)
        for name, value in case.run(reducer=reducer).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("blocks", [None, BLOCKS, GAPS], ids=["tokens", "blocks", "gaps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(blocks, dtype):
    case = make(seed=3, heads=2, n_keys=9, blocks=blocks).as_dtype(dtype)
    assert all(value.dtype == torch.float32 for value in case.run().values())
    check(case, rtol=2e-5, atol=1e-6)  # the brute force starts from the same rounded inputs


@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["tokens", "blocks"])
def test_a_large_part_that_all_values_share_costs_no_accuracy(blocks):
    """It cancels from every difference of values; |v|^2 - 2 v.o + |o|^2 without centring would lose it all."""
    case = make(seed=4, blocks=blocks)
    check(replace(case, values=case.values + 1000.0).as_dtype(torch.float32), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("gap", [3.0, 8.0, 14.0, 20.0, 40.0])
@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["tokens", "blocks"])
def test_a_unit_that_holds_nearly_all_mass(gap, blocks):
    """1 - a runs from 1e-1 to 1e-17: in float32 both 1 - a and |v - o|^2 cancel, yet their ratio is of order 1.

    An attention sink is such a unit; a score of 0 would evict the one token whose loss changes everything.
    """
    case = make(seed=7, n_queries=2, n_keys=9, dim=5, blocks=blocks)
    keys, query = case.keys.clone(), case.query.clone()
    keys[:, :, 0], query[..., 0] = 0.0, 1.0
    keys[:, 1, 0] = gap
    case = replace(case, keys=keys, query=query, scale=1.0).as_dtype(torch.float32)
    check(case, rtol=2e-3, atol=1e-6)
    heavy = 1 if blocks is None else 0
    if gap >= 20:
        assert bool((case.run()["change@1"].argmax(-1) == heavy).all())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    heads=st.integers(1, 2),
    group=st.integers(1, 2),
    n_queries=st.integers(1, 3),
    n_keys=st.integers(1, 7),
    block=st.integers(1, 4),
    reducer=st.sampled_from(["sum", "max"]),
    softcap=st.sampled_from([None, 2.0]),
    with_sinks=st.booleans(),
    data=st.data(),
)
def test_any_small_case(seed, heads, group, n_queries, n_keys, block, reducer, softcap, with_sinks, data):
    places = st.integers(0, n_keys + 1)
    blocks = [list(range(i, min(i + block, n_keys))) for i in range(0, n_keys, block)] if block > 1 else None
    case = make(
        seed, heads, group, n_queries, n_keys,
        query_positions=torch.tensor(data.draw(st.lists(places, min_size=n_queries, max_size=n_queries))),
        blocks=blocks,
        softcap=softcap,
        sinks=torch.full((heads, group), 0.3) if with_sinks else None,
    )  # fmt: skip
    check(case, reducer)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n_keys=st.integers(2, 9), block=st.integers(1, 4), sharpness=st.floats(0, 3))
def test_identities_of_leave_one_out(seed, n_keys, block, sharpness):
    """Sum of g is 0, MII = a^2 |mu_c - mu_rest|^2 and NoLev = a^2 (1 - a)^2 |mu_c - mu_rest|^2."""
    blocks = [list(range(i, min(i + block, n_keys))) for i in range(0, n_keys, block)] if block > 1 else None
    case = make(seed, 1, 1, 1, n_keys, weights=torch.ones(1, dtype=torch.float64), scale=sharpness, blocks=blocks)
    probs = attention_probs(case.query, case.keys, case.query_positions, case.key_positions, case.scale, None, None)
    mass, shift = unit_vectors(probs, case.values, case.unit_slots)
    torch.testing.assert_close(shift.sum(3), torch.zeros_like(shift[:, :, :, 0]), rtol=0, atol=1e-12)
    found = case.run()
    p, v = probs[0, 0, 0], case.values[0]
    for c, unit in enumerate(case.units):
        rest = [i for i in range(n_keys) if i not in unit]
        a = float(p[unit].sum())
        assert float(mass[0, 0, 0, c]) == pytest.approx(a)
        if not rest:
            continue
        distance = float(((p[unit] @ v[unit]) / a - (p[rest] @ v[rest]) / p[rest].sum()).square().sum())
        assert float(found["change@1"][0, 0, c]) == pytest.approx(a**2 * distance, rel=1e-7, abs=1e-14)
        assert float(found["change@0"][0, 0, c]) == pytest.approx(a**2 * (1 - a) ** 2 * distance, rel=1e-7, abs=1e-14)
        assert float(shift[0, 0, 0, c].square().sum()) == pytest.approx(
            float(found["change@0"][0, 0, c]), rel=1e-7, abs=1e-14
        )


def test_names_of_the_statistics():
    assert [change(a) for a in (0, 0.0, 1, 1.0, 0.5)] == ["change@0", "change@0", "change@1", "change@1", "change@0.5"]
