"""`packed_decode` against attention computed head by head in float64."""

import math
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvpress_kernels.reference import cpu_route, packed_units
from kvpress_kernels.reference.packed_decode import packed_decode

# relative error of the whole result; a half result carries at least its own rounding
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
# torch's own half matmul also rounds the logits and the weights
NATIVE_TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
ROUTES = [(dtype, False) for dtype in TOLERANCE] + [(dtype, True) for dtype in NATIVE_TOLERANCE]


def brute_force(query, keys, values, starts, lengths, *, scale, softcap=None, sinks=None) -> Tensor:
    batch, n_kv, group, _ = query.shape
    out = torch.zeros(batch, n_kv, group, values.shape[1], dtype=torch.float64)
    for b in range(batch):
        for h in range(n_kv):
            start, n = starts[b * n_kv + h], lengths[b * n_kv + h]
            for g in range(group):
                logits = keys[start : start + n].double() @ query[b, h, g].double() * scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                if sinks is not None:
                    logits = torch.cat([logits, sinks[h * group + g].double().view(1)])
                if len(logits):
                    out[b, h, g] = logits.softmax(0)[:n] @ values[start : start + n].double()
    return out


def make(batch, n_kv, group, dim, value_dim, lengths, dtype=torch.float32, slack=3, seed=0):
    """A query and a store whose tokens outside the segments are NaN; slack tokens follow each segment."""
    gen = torch.Generator().manual_seed(seed)
    starts = [2 + x for x in accumulate([0] + [n + slack for n in lengths[:-1]])]
    capacity = starts[-1] + lengths[-1] + 5
    keys = torch.full((capacity, dim), math.nan, dtype=dtype)
    values = torch.full((capacity, value_dim), math.nan, dtype=dtype)
    for start, n in zip(starts, lengths, strict=True):
        keys[start : start + n] = torch.randn(n, dim, generator=gen).to(dtype)
        values[start : start + n] = torch.randn(n, value_dim, generator=gen).to(dtype)
    query = torch.randn(batch, n_kv, group, dim, generator=gen).to(dtype)
    return query, keys, values, starts, list(lengths)


def assert_close(out: Tensor, ref: Tensor, tolerance: float) -> None:
    assert torch.isfinite(out).all()
    error = (out.double() - ref).norm() / ref.norm().clamp_min(1e-30)
    assert error <= tolerance, f"relative error {error:.2e}"


SHAPES = [  # batch, n_kv, group, head_dim, value_dim, lengths
    (1, 2, 7, 64, 64, [63, 63]),
    (1, 2, 7, 64, 64, [600, 600]),
    (2, 2, 3, 60, 48, [5, 17, 1, 300]),
    (1, 3, 1, 16, 80, [257, 0, 256]),
    (2, 1, 4, 33, 7, [0, 0]),
    (3, 2, 11, 24, 24, [1, 2, 3, 700, 512, 0]),
    (1, 1, 5, 128, 128, [1]),
]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("dtype", "native"), ROUTES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s[:5])))
def test_against_float64(shape, dtype, native, threads, monkeypatch):
    monkeypatch.setattr(cpu_route, "has_native_dot", lambda _: native)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    args = make(*shape, dtype=dtype)
    scale = shape[3] ** -0.5
    out = packed_decode(*args, scale=scale)
    assert out.dtype == dtype
    assert out.shape == (*args[0].shape[:3], shape[4])
    assert_close(out, brute_force(*args, scale=scale), (NATIVE_TOLERANCE if native else TOLERANCE)[dtype])


@pytest.mark.parametrize("lengths", [[300, 300], [300, 41], [0, 9], [0, 0]])
@pytest.mark.parametrize("threads", [1, 2])
def test_sinks_and_softcap(lengths, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    args = make(1, 2, 3, 32, 32, lengths)
    sinks = torch.tensor([0.5, -3.0, 8.0, 0.0, 100.0, -100.0])
    for options in ({"sinks": sinks}, {"softcap": 2.0}, {"sinks": sinks, "softcap": 2.0}):
        ref = brute_force(*args, scale=0.4, **options)
        assert_close(packed_decode(*args, scale=0.4, **options), ref, 1e-6)


def test_sinks_repeat_over_the_batch():
    args = make(3, 2, 2, 8, 8, [4, 9, 2, 2, 30, 1])
    sinks = torch.randn(4)
    assert_close(packed_decode(*args, scale=1.0, sinks=sinks), brute_force(*args, scale=1.0, sinks=sinks), 1e-6)


def test_equals_sdpa_in_float32():
    query, keys, values, starts, lengths = make(2, 2, 7, 64, 64, [512] * 4, slack=0)
    k = keys[2 : 2 + 2048].view(2, 2, 512, 64)
    v = values[2 : 2 + 2048].view(2, 2, 512, 64)
    sdpa = F.scaled_dot_product_attention(query.flatten(1, 2)[:, :, None], k, v, enable_gqa=True)
    out = packed_decode(query, keys, values, starts, lengths, scale=0.125)
    torch.testing.assert_close(out.flatten(1, 2)[:, :, None], sdpa, rtol=0, atol=1e-6)


def test_no_worse_than_sdpa_in_bfloat16(monkeypatch):
    monkeypatch.setattr(cpu_route, "has_native_dot", lambda _: False)
    query, keys, values, starts, lengths = make(1, 2, 4, 64, 64, [512] * 2, dtype=torch.bfloat16, slack=0)
    ref = brute_force(query, keys, values, starts, lengths, scale=0.125)
    k, v = (x[2 : 2 + 1024].view(1, 2, 512, 64) for x in (keys, values))
    sdpa = F.scaled_dot_product_attention(query.flatten(1, 2)[:, :, None], k, v, enable_gqa=True).view(ref.shape)
    ours = packed_decode(query, keys, values, starts, lengths, scale=0.125)
    assert (ours.double() - ref).norm() <= (sdpa.double() - ref).norm()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("lengths", [[40, 40], [40, 23]])
def test_extreme_logits(lengths, dtype):
    query, keys, values, starts, lengths = make(1, 2, 2, 16, 16, lengths, dtype=dtype)
    for factor in (1e4, -1e4, 0.0):
        q = torch.full_like(query, factor / 16)
        for start, n in zip(starts, lengths, strict=True):
            keys[start : start + n] = 1.0
        out = packed_decode(q, keys, values, starts, lengths, scale=1.0)  # logits are all `factor`: plain means
        assert_close(out, brute_force(q, keys, values, starts, lengths, scale=1.0), TOLERANCE[dtype])
        for start in starts:
            keys[start] = 0.5  # one token far above or below the rest
        out = packed_decode(q, keys, values, starts, lengths, scale=1.0)
        assert_close(out, brute_force(q, keys, values, starts, lengths, scale=1.0), TOLERANCE[dtype])


@pytest.mark.parametrize("lengths", [[2000, 2000], [1500, 700]])
def test_staging_buffer_smaller_than_the_store(lengths, monkeypatch):
    """Row tiles and unit groups: the same result through a buffer of 300 tokens as through a large one."""
    args = make(1, 2, 7, 16, 16, lengths, dtype=torch.bfloat16)
    monkeypatch.setattr(cpu_route, "has_native_dot", lambda _: False)
    ref = brute_force(*args, scale=0.25)
    assert_close(packed_decode(*args, scale=0.25), ref, 4e-3)
    for tokens in (1, 300, 2000):
        monkeypatch.setattr(cpu_route, "STAGE_BYTES", tokens * 16 * 4)
        assert_close(packed_decode(*args, scale=0.25), ref, 4e-3)


def test_buffers_survive_modes_and_bad_values():
    """No inference tensor, gradient or NaN stays in the reused buffers."""
    args = make(1, 2, 3, 16, 16, [10, 7])
    ref = packed_decode(*args, scale=0.25)
    poisoned = [args[0], torch.full_like(args[1], math.nan), torch.full_like(args[2], math.inf), *args[3:]]
    assert torch.isnan(packed_decode(*poisoned, scale=0.25)).all()
    with torch.inference_mode():
        assert torch.equal(packed_decode(*args, scale=0.25), ref)
    trained = [args[0].clone().requires_grad_(), *args[1:]]
    assert torch.equal(packed_decode(*trained, scale=0.25), ref)
    assert not packed_decode(*trained, scale=0.25).requires_grad
    with torch.inference_mode():
        uniform = make(1, 2, 3, 200, 200, [700, 700], dtype=torch.float16)
        first = packed_decode(*uniform, scale=0.25)
    assert torch.equal(packed_decode(*uniform, scale=0.25), first)


def test_strided_buffers_and_queries():
    query, keys, values, starts, lengths = make(1, 2, 3, 16, 16, [300, 300])
    wide = torch.stack((keys, values), dim=1)  # K and V interleaved: token stride 2 * dim
    turned = query.transpose(1, 2).contiguous().transpose(1, 2)
    out = packed_decode(turned, wide[:, 0], wide[:, 1], starts, lengths, scale=0.25)
    assert_close(out, brute_force(query, keys, values, starts, lengths, scale=0.25), 1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
    st.integers(1, 8),
    st.integers(1, 40),
    st.integers(0, 10**6),
    st.data(),
)
def test_permuted_segments_permute_the_output(lengths, group, unit, seed, data):
    """The result of a segment depends neither on its neighbours nor on how the work is cut into units."""
    query, keys, values, starts, lengths = make(1, len(lengths), group, 8, 6, lengths, torch.float64, seed=seed)
    order = data.draw(st.permutations(range(len(lengths))))
    out = packed_decode(query, keys, values, starts, lengths, scale=0.5)
    size, packed_units.UNIT_TOKENS = packed_units.UNIT_TOKENS, unit
    try:
        moved = packed_decode(
            query[:, order], keys, values, [starts[i] for i in order], [lengths[i] for i in order], scale=0.5
        )
    finally:
        packed_units.UNIT_TOKENS = size
    torch.testing.assert_close(moved, out[:, order], rtol=0, atol=1e-13)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 10**6))
def test_parts_of_a_segment_join_by_their_mass(first, second, seed):
    """Attention over a whole segment is the mean of its two parts, weighted by the sums of exponentials."""
    query, keys, values, starts, _ = make(1, 1, 3, 8, 8, [first + second], torch.float64, seed=seed)
    begin = starts[0]
    mass = (query[0, 0] @ keys[begin : begin + first + second].T).exp()
    share = mass[:, :first].sum(-1, keepdim=True) / mass.sum(-1, keepdim=True)
    left = packed_decode(query, keys, values, [begin], [first], scale=1.0)[0, 0]
    right = packed_decode(query, keys, values, [begin + first], [second], scale=1.0)[0, 0]
    whole = packed_decode(query, keys, values, [begin], [first + second], scale=1.0)[0, 0]
    torch.testing.assert_close(whole, share * left + (1 - share) * right, rtol=0, atol=1e-12)


def test_refusals():
    query, keys, values, starts, lengths = make(1, 2, 3, 16, 16, [10, 7])
    with pytest.raises(ValueError, match="head_dim 16"):
        packed_decode(query, keys[:, :8], values, starts, lengths, scale=1.0)
    with pytest.raises(ValueError, match="expected 2 segments"):
        packed_decode(query, keys, values, starts[:1], lengths[:1], scale=1.0)
    with pytest.raises(ValueError, match="outside the buffer"):
        packed_decode(query, keys, values, starts, [10, 700], scale=1.0)
    with pytest.raises(ValueError, match="6 logits"):
        packed_decode(query, keys, values, starts, lengths, scale=1.0, sinks=torch.zeros(2))


def test_native_dot_is_a_decision_per_dtype():
    cpu = torch.device("cpu")
    assert cpu_route.matmul_dtype(torch.float32, cpu) == torch.float32
    assert cpu_route.matmul_dtype(torch.float64, cpu) == torch.float64
    for dtype in (torch.float16, torch.bfloat16):
        native = cpu_route.has_native_dot(dtype)
        assert cpu_route.matmul_dtype(dtype, cpu) == (dtype if native else torch.float32)
        assert cpu_route.matmul_dtype(dtype, torch.device("cuda")) == dtype
