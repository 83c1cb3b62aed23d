"""tanh in kernels against torch in float64."""

import pytest
import torch
import triton
import triton.language as tl

from kvpress_kernels.softcap import tanh


@triton.jit
def _tanh(X, N: tl.constexpr):
    at = X + tl.arange(0, N)
    tl.store(at, tanh(tl.load(at)))


@pytest.mark.filterwarnings("ignore:overflow")
def test_digits_of_small_numbers_are_kept():
    sizes = torch.cat([torch.linspace(-6, 1.5, 511), torch.tensor([4.0])])  # exp of twice the last one overflows
    x = torch.cat([-(10**sizes), 10**sizes])
    expected, found = x.double().tanh(), x.clone()
    _tanh[(1,)](found, 1024)
    assert ((found.double() - expected) / expected).abs().max() < 3e-7


def test_zero_stays_zero():
    x = torch.zeros(16)
    _tanh[(1,)](x, 16)
    assert not x.any()
