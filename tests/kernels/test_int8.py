"""Eight-bit storage: its rounding error, and attention over codes against attention over what they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpress_kernels.reference.int8 import dequantise, quantise
from kvpress_kernels.reference.packed_attention import packed_attention
from kvpress_kernels.reference.packed_decode import packed_decode


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.floats(1e-4, 1e4), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_the_error_is_half_a_scale(dim, size, dtype):
    vectors = (torch.randn(5, 3, dim, dtype=torch.float64) * size).to(dtype)
    codes, scales = quantise(vectors)
    assert (codes.dtype, scales.dtype, scales.shape) == (torch.int8, torch.float16, (5, 3))
    found = dequantise(codes, scales, torch.float64)
    error = (found - vectors.double()).abs()
    bound = scales.double()[..., None] * 0.5 + vectors.double().abs() * 2**-10 + 4e-6
    assert (error <= bound).all()
    assert (codes.abs().amax(-1) >= 126).all() or size < 1e-2


def test_zeros_extremes_and_what_is_no_number():
    codes, scales = quantise(torch.zeros(2, 4))
    assert not codes.any()
    assert torch.equal(dequantise(codes, scales, torch.float32), torch.zeros(2, 4))
    huge = dequantise(*quantise(torch.tensor([[3e8, -1.0, 0.0]])), torch.float32)
    assert torch.isfinite(huge).all()
    assert huge[0, 0] == 127 * 65504
    tiny = dequantise(*quantise(torch.tensor([[1e-8, -1e-9]])), torch.float32)
    assert tiny.abs().max() <= 1e-5


def stored(lengths, gaps, dtype, dim=24, value_dim=20):
    """Codes and scales of ragged segments with poison in the gaps, and dense dequantised copies."""
    starts, at = [], 0
    for length, gap in zip(lengths, gaps, strict=True):
        starts.append(at)
        at += length + gap
    keys, values = torch.randn(at, dim) * 3, torch.randn(at, value_dim)
    (k, ks), (v, vs) = quantise(keys), quantise(values)
    for start, length, gap in zip(starts, lengths, gaps, strict=True):
        ks[start + length : start + length + gap] = torch.nan
        vs[start + length : start + length + gap] = torch.nan
    return starts, (k, ks), (v, vs), dequantise(k, ks, dtype), dequantise(v, vs, dtype)


CASES = {
    "even": ([40] * 4, [3] * 4),
    "ragged": ([40, 1, 17, 33], [0, 2, 5, 0]),
    "empty": ([0, 9, 0, 2], [1, 0, 0, 4]),
    "long": ([600, 300, 601, 5], [0, 1, 0, 0]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_decoding_over_codes(name, with_sinks, softcap):
    starts, (k, ks), (v, vs), keys, values = stored(*CASES[name], torch.float64)
    lengths = CASES[name][0]
    query = torch.randn(2, 2, 3, 24, dtype=torch.float64)
    options = {"scale": 0.2, "softcap": softcap, "sinks": torch.randn(6) if with_sinks else None}
    found = packed_decode(query, k, v, starts, lengths, key_scales=ks, value_scales=vs, **options)
    torch.testing.assert_close(found, packed_decode(query, keys, values, starts, lengths, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_in_other_dtypes(dtype):
    starts, (k, ks), (v, vs), keys, values = stored(*CASES["even"], torch.float32)
    query = torch.randn(2, 2, 3, 24).to(dtype)
    lengths = CASES["even"][0]
    found = packed_decode(query, k, v, starts, lengths, scale=0.2, key_scales=ks, value_scales=vs)
    expected = packed_decode(query.float(), keys, values, starts, lengths, scale=0.2)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", CASES)
def test_several_queries_over_codes(name):
    starts, (k, ks), (v, vs), keys, values = stored(*CASES[name], torch.float64)
    lengths = CASES[name][0]
    positions = torch.zeros(len(keys), dtype=torch.int32)
    for start, length in zip(starts, lengths, strict=True):
        positions[start : start + length] = torch.arange(length, dtype=torch.int32) * 2
    query, at = torch.randn(2, 2, 3, 5, 24, dtype=torch.float64), torch.tensor([3, 50, 70, 71, 2000])
    found = packed_attention(query, k, v, positions, starts, lengths, at, scale=0.2, key_scales=ks, value_scales=vs)
    torch.testing.assert_close(found, packed_attention(query, keys, values, positions, starts, lengths, at, scale=0.2))
