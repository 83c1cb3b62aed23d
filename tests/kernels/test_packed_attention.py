"""`packed_attention` against attention computed query by query in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvpress_kernels.reference import cpu_route, packed_attention
from kvpress_kernels.reference.packed_attention import packed_attention as attend
from kvpress_kernels.reference.packed_decode import packed_decode

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
NATIVE_TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
ROUTES = [(dtype, False) for dtype in TOLERANCE] + [(dtype, True) for dtype in NATIVE_TOLERANCE]


def brute_force(
    query, keys, values, positions, starts, lengths, query_positions, *, scale, softcap=None, sinks=None
) -> Tensor:
    batch, n_kv, group, n_queries, _ = query.shape
    out = torch.zeros(batch, n_kv, group, n_queries, values.shape[1], dtype=torch.float64)
    for b in range(batch):
        for h in range(n_kv):
            start, n = starts[b * n_kv + h], lengths[b * n_kv + h]
            for g in range(group):
                for i in range(n_queries):
                    seen = [t for t in range(start, start + n) if positions[t] <= query_positions[i]]
                    logits = keys[seen].double() @ query[b, h, g, i].double() * scale
                    if softcap is not None:
                        logits = softcap * torch.tanh(logits / softcap)
                    if sinks is not None:
                        logits = torch.cat([logits, sinks[h * group + g].double().view(1)])
                    if seen:
                        out[b, h, g, i] = logits.softmax(0)[: len(seen)] @ values[seen].double()
    return out


def make(batch, n_kv, group, n_queries, dim, value_dim, lengths, dtype=torch.float32, span=100, seed=0):
    """Tokens kept at random ascending positions below `span`; everything outside the segments is poison."""
    gen = torch.Generator().manual_seed(seed)
    starts, at = [], 3
    for n in lengths:
        starts.append(at)
        at += n + 2
    keys = torch.full((at, dim), math.nan, dtype=dtype)
    values = torch.full((at, value_dim), math.nan, dtype=dtype)
    positions = torch.full((at,), -1, dtype=torch.int32)
    for start, n in zip(starts, lengths, strict=True):
        keys[start : start + n] = torch.randn(n, dim, generator=gen).to(dtype)
        values[start : start + n] = torch.randn(n, value_dim, generator=gen).to(dtype)
        positions[start : start + n] = torch.randperm(span, generator=gen)[:n].sort().values.int()
    query = torch.randn(batch, n_kv, group, n_queries, dim, generator=gen).to(dtype)
    query_positions = torch.arange(span - n_queries, span)
    return query, keys, values, positions, starts, list(lengths), query_positions


def assert_close(out: Tensor, ref: Tensor, tolerance: float) -> None:
    assert torch.isfinite(out).all()
    error = (out.double() - ref).norm() / ref.norm().clamp_min(1e-30)
    assert error <= tolerance, f"relative error {error:.2e}"


SHAPES = [  # batch, n_kv, group, n_queries, head_dim, value_dim, lengths
    (1, 2, 7, 5, 64, 64, [63, 63]),
    (2, 2, 3, 1, 20, 12, [5, 17, 1, 90]),
    (1, 3, 1, 33, 16, 24, [57, 0, 100]),
    (1, 2, 4, 60, 8, 8, [100, 31]),
    (2, 1, 2, 3, 33, 7, [0, 0]),
]


@pytest.mark.parametrize(("dtype", "native"), ROUTES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s[:6])))
def test_against_float64(shape, dtype, native, monkeypatch):
    monkeypatch.setattr(cpu_route, "has_native_dot", lambda _: native)
    args = make(*shape, dtype=dtype)
    scale = shape[4] ** -0.5
    out = attend(*args, scale=scale)
    assert out.dtype == dtype
    assert out.shape == (*args[0].shape[:4], shape[5])
    assert_close(out, brute_force(*args, scale=scale), (NATIVE_TOLERANCE if native else TOLERANCE)[dtype])


def test_sinks_and_softcap():
    args = make(2, 2, 3, 12, 16, 16, [40, 7, 0, 100], span=110)
    sinks = torch.tensor([0.5, -3.0, 8.0, 0.0, 100.0, -100.0])
    for options in ({"sinks": sinks}, {"softcap": 2.0}, {"sinks": sinks, "softcap": 2.0}):
        ref = brute_force(*args, scale=0.4, **options)
        assert_close(attend(*args, scale=0.4, **options), ref, 1e-6)


@pytest.mark.parametrize("sinks", [None, torch.zeros(4)])
def test_queries_before_every_stored_token_give_zeros(sinks):
    query, keys, values, positions, starts, lengths, _ = make(1, 2, 2, 6, 8, 8, [10, 4])
    first = torch.stack([positions[s] for s in starts]).max()
    at = torch.tensor([-5, -1, int(first) - 1, int(first), 98, 99])
    at = torch.where(at == int(first) - 1, -2, at)
    out = attend(query, keys, values, positions, starts, lengths, at, scale=1.0, sinks=sinks)
    assert torch.isfinite(out).all()
    assert (out[:, :, :, :3] == 0).all()
    ref = brute_force(query, keys, values, positions, starts, lengths, at, scale=1.0, sinks=sinks)
    assert_close(out, ref, 1e-6)


def test_query_positions_in_any_order():
    args = make(1, 2, 2, 9, 8, 8, [50, 20])
    at = torch.tensor([3, 99, 0, 50, 51, 50, 2, 77, 10])
    assert_close(attend(*args[:-1], at, scale=1.0), brute_force(*args[:-1], at, scale=1.0), 1e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_extreme_logits(dtype):
    query, *rest = make(1, 2, 2, 7, 16, 16, [40, 23], dtype=dtype, span=45)
    for factor in (1e4, -1e4, 0.0):
        q = torch.full_like(query, factor / 16)
        for start, n in zip(rest[3], rest[4], strict=True):
            rest[0][start : start + n] = 1.0
            rest[0][start] = 0.5
        assert_close(attend(q, *rest, scale=1.0), brute_force(q, *rest, scale=1.0), TOLERANCE[dtype])


def test_scores_stay_below_the_limit(monkeypatch):
    """The result does not depend on how the queries are chunked, and a chunk's scores fit the limit."""
    args = make(1, 2, 3, 40, 8, 8, [60, 90], dtype=torch.float64)
    whole = attend(*args, scale=0.4)
    sizes = []
    plain = packed_attention._attend

    def measured(q_gqd, k_nd, *rest):
        sizes.append(q_gqd.shape[0] * q_gqd.shape[1] * k_nd.shape[0] * 8)
        return plain(q_gqd, k_nd, *rest)

    monkeypatch.setattr(packed_attention, "_attend", measured)
    for limit in (1, 30_000, 80_000):
        sizes.clear()
        monkeypatch.setattr(packed_attention, "SCORE_BYTES", limit)
        torch.testing.assert_close(attend(*args, scale=0.4), whole, rtol=0, atol=1e-13)
        assert max(sizes) <= max(limit, 3 * 90 * 8)
        assert len(sizes) > 2


def test_one_query_equals_decode():
    query, keys, values, positions, starts, lengths, at = make(2, 2, 7, 1, 16, 16, [50, 20, 0, 99])
    out = attend(query, keys, values, positions, starts, lengths, at, scale=0.25)
    single = packed_decode(query[:, :, :, 0], keys, values, starts, lengths, scale=0.25)
    torch.testing.assert_close(out[:, :, :, 0], single, rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 12), st.integers(0, 10**6), st.data())
def test_permuted_segments_and_split_queries(lengths, n_queries, seed, data):
    """Segments and queries are independent of each other: any order, any cut gives the same numbers."""
    query, *store, at = make(1, len(lengths), 2, n_queries, 8, 6, lengths, torch.float64, span=40, seed=seed)
    keys, values, positions, starts, lengths = store
    order = data.draw(st.permutations(range(len(lengths))))
    cut = data.draw(st.integers(0, n_queries))
    out = attend(query, *store, at, scale=0.5)
    moved = attend(
        query[:, order],
        keys,
        values,
        positions,
        [starts[i] for i in order],
        [lengths[i] for i in order],
        at,
        scale=0.5,
    )
    torch.testing.assert_close(moved, out[:, order], rtol=0, atol=1e-13)
    parts = [attend(query[:, :, :, i:j], *store, at[i:j], scale=0.5) for i, j in ((0, cut), (cut, n_queries)) if i < j]
    torch.testing.assert_close(torch.cat(parts, dim=3), out, rtol=0, atol=1e-13)


def test_refusals():
    query, keys, values, positions, starts, lengths, at = make(1, 2, 3, 4, 16, 16, [10, 7])
    with pytest.raises(ValueError, match="one position per stored token"):
        attend(query, keys, values, positions[:-1], starts, lengths, at, scale=1.0)
    with pytest.raises(ValueError, match="per query"):
        attend(query, keys, values, positions, starts, lengths, at[:-1], scale=1.0)
    with pytest.raises(ValueError, match="outside the buffer"):
        attend(query, keys, values, positions, starts, [10, 700], at, scale=1.0)
