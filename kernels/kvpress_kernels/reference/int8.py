"""Numbers in eight bits: one scale for each stored vector (a token's key or value in one head), the reference of the int8 kernels.

scale = max |x| / 127,  code = round(x / scale),  x is read as code * scale          symmetric, no zero point
"""

from __future__ import annotations

import torch
from torch import Tensor

#: of the stored scales; the largest value that can be stored is 127 times the largest float16
SCALE_DTYPE = torch.float16


def quantise(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., d] and scales float16 [...] of vectors [..., d] of any float dtype.

    Rounding error of a number x: at most half a scale, what rounding the scale to float16 adds (|x| / 1024), and 4e-6, since float16
    has no scales between 0 and 6e-8. Numbers larger than 8.3 million are cut off there.
    """
    wide = vectors.detach() if vectors.dtype == torch.float64 else vectors.detach().float()
    limit = torch.finfo(SCALE_DTYPE).max
    # by a tensor, so that every device divides: a Python number leaves it free to multiply with the rounded reciprocal
    scales = (wide.abs().amax(-1) / wide.new_full((), 127)).clamp(max=limit).to(SCALE_DTYPE)
    divisor = scales.to(wide.dtype)
    codes = wide / torch.where(divisor == 0, 1, divisor)[..., None]  # a vector of zeros
    return codes.round_().clamp_(-127, 127).to(torch.int8), scales


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The vectors [..., d] that codes [..., d] and scales [...] stand for."""
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * scales.to(wide)[..., None]).to(dtype)
