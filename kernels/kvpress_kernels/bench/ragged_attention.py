"""Several new tokens over pages: assisted decoding, a second turn."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kvpress_kernels.bench.measurement import Measurement, Prepared
from kvpress_kernels.bench.shapes import Scale, filled, normal


def measurements(scale: Scale, device: torch.device) -> Iterator[Measurement]:
    n_tokens = scale.contexts[1] * scale.k_tokens
    for batch in scale.batches[:2]:
        for queries in (4, scale.k_tokens // 2):
            rows, item = batch * scale.n_kv_heads, scale.dtype.itemsize
            nbytes = rows * (n_tokens * scale.layout().token_bytes + 2 * scale.group * queries * scale.dim * item)
            floating = 4 * rows * scale.group * queries * n_tokens * scale.dim
            prepare = partial(_prepare, scale=scale, batch=batch, n_tokens=n_tokens, queries=queries)
            setting = {"batch": batch, "tokens": n_tokens, "queries": queries}
            yield Measurement("ragged_attention", setting, prepare, nbytes, floating)


def _prepare(device: torch.device, seed: int, *, scale: Scale, batch: int, n_tokens: int, queries: int) -> Prepared:
    from kvpress_kernels.ragged_attention import ragged_attention

    held = filled(device, scale.layout(), [n_tokens] * batch * scale.n_kv_heads, seed)
    query = normal((batch, scale.n_kv_heads, scale.group, queries, scale.dim), scale.dtype, device, seed)
    positions = torch.arange(n_tokens - queries, n_tokens, device=device)

    def launch() -> object:
        return ragged_attention(query, held.pages, held.page_table, held.lengths, positions, scale=scale.dim**-0.5)

    return Prepared(launch)
