"""tanh for kernels: Triton has none of its own, and the interpreter cannot call the device libraries'."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh of float32 to about one unit in the last place.

    1 - 2 / (exp(2 |x|) + 1) alone loses the digits of a small x, and most logits are small against their cap: below
    0.625 it is the polynomial of the Cephes library.
    """
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(2.8853900817779268 * size) + 1.0)  # 2 log2(e)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))
