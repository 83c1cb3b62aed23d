"""Moving the kept tokens of a dense prompt into pages."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kvpress_kernels.bench.measurement import Measurement, Prepared
from kvpress_kernels.bench.shapes import Scale, filled, normal


def measurements(scale: Scale, device: torch.device) -> Iterator[Measurement]:
    n_tokens = scale.contexts[-1] * scale.k_tokens
    for divisor in (10, 4, 1):
        kept = n_tokens // divisor
        nbytes = scale.n_kv_heads * kept * (2 * scale.layout().token_bytes)
        prepare = partial(_prepare, scale=scale, n_tokens=n_tokens, kept=kept)
        yield Measurement("gather_pages", {"tokens": n_tokens, "kept": kept}, prepare, nbytes)


def _prepare(device: torch.device, seed: int, *, scale: Scale, n_tokens: int, kept: int) -> Prepared:
    from kvpress_kernels.gather_pages import gather_pages

    rows = scale.n_kv_heads
    held = filled(device, scale.layout(), [kept] * rows, seed)
    shape = (1, n_tokens, rows, scale.dim)
    keys, values = (normal(shape, scale.dtype, device, seed + i).transpose(1, 2) for i in range(2))
    columns = torch.cat([torch.randperm(n_tokens, device=device)[:kept].sort().values for _ in range(rows)]).int()
    offsets = torch.arange(rows + 1, dtype=torch.int32, device=device) * kept
    return Prepared(lambda: gather_pages(keys, values, columns, offsets, held.pages, held.page_table, max_kept=kept))
