"""How the torch references multiply half-precision matrices on this machine, and their reusable buffers.

A CPU with a bf16 (or fp16) dot-product instruction multiplies half matrices directly, fast. On a CPU without
one the batched half matmul of torch 2.13 is a scalar loop: decode attention over 8,192 tokens (7 query heads
per KV head, head_dim 64, 2 cores, AVX2) takes 9.9 ms that way and 0.6 ms when K and V are first widened to
float32 in a buffer that stays in the cache. `has_native_dot` is the one place that decides; tests replace it.
"""

from __future__ import annotations

import math
import threading
from functools import lru_cache

import torch
from torch import Tensor

# One staging buffer never exceeds this. Above it the widened tile falls out of the last-level cache and is
# written to and read back from memory: at 8 KV heads x 8,192 tokens x 128 the step is then twice as slow.
STAGE_BYTES = 8 << 20


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.flat: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.latest_key: tuple[tuple[int, ...], torch.dtype, torch.device] | None = None
        self.latest = torch.empty(0)


_buffers = _Buffers()


@lru_cache(maxsize=8)
def has_native_dot(dtype: torch.dtype) -> bool:
    """True if this CPU multiplies matrices of `dtype` (float16 or bfloat16) in hardware.

    Asks torch for the instruction sets: AVX512-BF16 or AMX for bfloat16, AVX512-FP16 or AMX-FP16 for float16.
    Anything unknown (an old torch, another architecture) counts as no, which is slower where it is wrong and
    never inexact.
    """
    probe = getattr(torch.cpu, "get_capabilities", None)
    flags = probe() if probe is not None else {}
    names = ("avx512_bf16", "amx_bf16") if dtype == torch.bfloat16 else ("avx512_fp16", "amx_fp16")
    if any(bool(flags.get(name)) for name in names):
        return True
    # an older torch has no list of capabilities, but this question
    older = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return dtype == torch.bfloat16 and older is not None and bool(older())


def matmul_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which matrices of `dtype` are multiplied on `device`: itself, or float32 for slow halves."""
    if dtype in (torch.float32, torch.float64):
        return dtype
    if device.type != "cpu" or has_native_dot(dtype):
        return dtype
    return torch.float32


def stage(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A reused, uninitialised buffer of `shape`; its content is valid until the next call for this dtype and device.

    One buffer per thread, dtype and device. Requests above STAGE_BYTES are served, but not kept.
    """
    key = (shape, dtype, device)
    if key == _buffers.latest_key:  # all layers of a step ask for the same
        return _buffers.latest
    numel = math.prod(shape)
    flat = _buffers.flat.get((dtype, device))
    if flat is None or flat.numel() < numel:
        # An inference tensor could not be written outside inference mode later, so leave that mode here.
        with torch.inference_mode(False):
            flat = torch.empty(numel, dtype=dtype, device=device)
        if flat.nbytes <= STAGE_BYTES:
            _buffers.flat[(dtype, device)] = flat
    view = flat[:numel].view(shape)
    if flat.nbytes <= STAGE_BYTES:
        _buffers.latest_key, _buffers.latest = key, view
    return view
