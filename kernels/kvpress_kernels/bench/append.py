"""Storing one new token of every sequence, and of a chunk of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kvpress_kernels.bench.measurement import Measurement, Prepared
from kvpress_kernels.bench.shapes import Scale, filled, normal

#: launches on the same pages: every one makes the rows longer, and pages for that are there from the start
AT_MOST = 256


def measurements(scale: Scale, device: torch.device) -> Iterator[Measurement]:
    for batch in scale.batches:
        for n_tokens in (1, scale.k_tokens // 2):
            rows = batch * scale.n_kv_heads
            nbytes = 2 * rows * n_tokens * scale.layout().token_bytes
            at_most = AT_MOST if n_tokens == 1 else 20
            prepare = partial(_prepare, scale=scale, batch=batch, n_tokens=n_tokens, room=at_most * n_tokens)
            sets = 8 if n_tokens == 1 else 2
            yield Measurement(
                "append", {"batch": batch, "new tokens": n_tokens}, prepare, nbytes, at_most=at_most, sets=sets
            )


def _prepare(device: torch.device, seed: int, *, scale: Scale, batch: int, n_tokens: int, room: int) -> Prepared:
    from kvpress_kernels.append import append

    held = filled(device, scale.layout(), [scale.k_tokens] * batch * scale.n_kv_heads, seed, room)
    shape = (batch, n_tokens, scale.n_kv_heads, scale.dim)
    keys, values = (normal(shape, scale.dtype, device, seed + i).transpose(1, 2) for i in range(2))
    columns = torch.arange(n_tokens, device=device) + scale.k_tokens
    return Prepared(lambda: append(keys, values, columns, held.pages, held.page_table, held.lengths))
