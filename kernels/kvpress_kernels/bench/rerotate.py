"""Turning stored keys back by the positions that were evicted before them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kvpress_kernels.bench.measurement import Measurement, Prepared
from kvpress_kernels.bench.shapes import Scale, filled


def measurements(scale: Scale, device: torch.device) -> Iterator[Measurement]:
    n_tokens = scale.contexts[1] * scale.k_tokens
    for batch in scale.batches:
        rows = batch * scale.n_kv_heads
        # keys twice, a shift and a row of each table
        nbytes = rows * n_tokens * (2 * scale.dim * scale.dtype.itemsize + 4) + 4 * n_tokens * scale.dim
        prepare = partial(_prepare, scale=scale, rows=rows, n_tokens=n_tokens)
        yield Measurement("rerotate", {"rows": rows, "tokens": n_tokens}, prepare, nbytes)


def _prepare(device: torch.device, seed: int, *, scale: Scale, rows: int, n_tokens: int) -> Prepared:
    from kvpress_kernels.rerotate import rerotate

    held = filled(device, scale.layout(), [n_tokens] * rows, seed)
    angles = torch.arange(n_tokens, device=device)[:, None] * 1e4 ** (
        -torch.arange(0, scale.dim, 2, device=device) / scale.dim
    )
    cos, sin = angles.cos(), angles.sin()
    shifts = torch.randint(0, n_tokens, (rows, held.slots.shape[1] * scale.page_sizes[0]), device=device).int()
    return Prepared(lambda: rerotate(held.pages, held.page_table, held.lengths, shifts, cos, sin))
