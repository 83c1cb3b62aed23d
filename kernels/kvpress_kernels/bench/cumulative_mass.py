"""Attention mass of a whole prompt: bound by arithmetic, so floating point operations are given too."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from kvpress_kernels.bench.measurement import Measurement, Prepared
from kvpress_kernels.bench.shapes import Scale, normal


def measurements(scale: Scale, device: torch.device) -> Iterator[Measurement]:
    for context in scale.contexts[:2]:
        n_tokens = context * scale.k_tokens
        heads = scale.n_kv_heads * scale.group
        # two passes over the lower triangle, one product of queries with keys each
        floating = 2 * 2 * heads * n_tokens * n_tokens * scale.dim // 2
        nbytes = 2 * (heads + scale.n_kv_heads) * n_tokens * scale.dim * scale.dtype.itemsize + 4 * heads * n_tokens
        prepare = partial(_prepare, scale=scale, n_tokens=n_tokens)
        yield Measurement("cumulative_mass", {"tokens": n_tokens}, prepare, nbytes, floating)


def _prepare(device: torch.device, seed: int, *, scale: Scale, n_tokens: int) -> Prepared:
    from kvpress_kernels.cumulative_mass import cumulative_mass

    heads, factor = scale.n_kv_heads, scale.dim**-0.5
    query = normal((heads, scale.group, n_tokens, scale.dim), scale.dtype, device, seed)
    keys = normal((heads, n_tokens, scale.dim), scale.dtype, device, seed + 1)
    positions = torch.arange(n_tokens, device=device)
    packed, dense = query.view(1, heads * scale.group, n_tokens, scale.dim), keys[None]
    return Prepared(
        lambda: cumulative_mass(query, keys, positions, positions, scale=factor),
        {
            # attention itself, which does as many products of this kind
            "sdpa, causal": lambda: F.scaled_dot_product_attention(
                packed, dense, dense, is_causal=True, scale=factor, enable_gqa=True
            )
        },
    )
