"""Numbers in eight bits inside kernels: how a tile becomes codes and scales, and how scales enter attention.

A cache of codes is never brought back to numbers. Codes are exact in every float dtype, so they go into the two products of
attention as they are, and the scales of tokens into what stands between these:

    logits = (q codes_K^T) scale_K        output = (weights scale_V) codes_V

Formulas of the codes: `kvpress_kernels.reference.int8`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantise(tile):
    """Codes int8 [T, D] and scales float16 [T] of a tile [T, D], to the bit those of the reference."""
    wide = tile.to(tl.float32)
    # division to the nearest: the plain one of a device is off by two units in the last place
    scale = tl.div_rn(tl.max(tl.abs(wide), 1), tl.full([tile.shape[0]], 127.0, tl.float32))
    scale = tl.minimum(scale, 65504.0).to(tl.float16)
    divisor = scale.to(tl.float32)
    divisor = tl.where(divisor == 0, 1.0, divisor)
    steps = tl.div_rn(wide, tl.broadcast_to(divisor[:, None], wide.shape))
    steps = tl.minimum(tl.maximum(steps, -127.0), 127.0)
    # 1.5 * 2^23 leaves no bit behind the point, and rounds halves to even; Triton has no such rounding in its interpreter
    return ((steps + 12582912.0) - 12582912.0).to(tl.int8), scale


@triton.jit
def scales_of(word):
    """Scales of keys and of values, float32, from the 32-bit words [P] that hold both of a token."""
    key = word.to(tl.int16).to(tl.float16, bitcast=True)
    value = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return key.to(tl.float32), value.to(tl.float32)


@triton.jit
def scaled(weights, scale, WITH_UNIT: tl.constexpr):
    """Weights [G, P] times the scales [P] of the values, and the unit that they are in: a factor of the product with the codes.

    WITH_UNIT: the unit is the largest scale, else 1. A product in float16 needs it: there weights times small scales lose
    their last digits. bfloat16 reaches as far down as float32.
    """
    unit = 1.0
    if WITH_UNIT:
        unit = tl.max(scale, 0)
        scale = scale / tl.where(unit == 0, 1.0, unit)
    return weights * scale[None, :], unit
