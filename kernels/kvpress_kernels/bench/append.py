"""Storing one new token of every sequence, and of a chunk of a prompt."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from kvpress_kernels.bench.measurement import Measurement, Prepared
from kvpress_kernels.bench.shapes import Scale, filled, normal
from kvpress_kernels.pages import PageLayout

#: launches on the same pages: every one makes the rows longer, and pages for that are there from the start
AT_MOST = 256


def measurements(scale: Scale, device: torch.device) -> Iterator[Measurement]:
    for batch in scale.batches:
        for n_tokens, stored in itertools.product((1, scale.k_tokens // 2), (scale.dtype, torch.int8)):
            rows, layout = batch * scale.n_kv_heads, scale.layout(dtype=stored)
            nbytes = rows * n_tokens * (scale.layout().token_bytes + layout.token_bytes)
            at_most = AT_MOST if n_tokens == 1 else 20
            room = at_most * n_tokens
            prepare = partial(_prepare, scale=scale, layout=layout, batch=batch, n_tokens=n_tokens, room=room)
            sets = 8 if n_tokens == 1 else 2
            setting = {"batch": batch, "new tokens": n_tokens, "stored": str(stored).removeprefix("torch.")}
            yield Measurement("append", setting, prepare, nbytes, at_most=at_most, sets=sets)


def _prepare(
    device: torch.device, seed: int, *, scale: Scale, layout: PageLayout, batch: int, n_tokens: int, room: int
) -> Prepared:
    from kvpress_kernels.append import append

    held = filled(device, layout, [scale.k_tokens] * batch * scale.n_kv_heads, seed, room)
    shape = (batch, n_tokens, scale.n_kv_heads, scale.dim)
    keys, values = (normal(shape, scale.dtype, device, seed + i).transpose(1, 2) for i in range(2))
    columns = torch.arange(n_tokens, device=device) + scale.k_tokens
    return Prepared(lambda: append(keys, values, columns, held.pages, held.page_table, held.lengths))
