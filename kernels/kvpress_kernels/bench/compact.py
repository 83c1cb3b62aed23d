"""Closing the gaps of evicted tokens. The same tokens move every time: where a row ends does not matter to the copy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kvpress_kernels.bench.measurement import Measurement, Prepared
from kvpress_kernels.bench.shapes import Scale, filled


def measurements(scale: Scale, device: torch.device) -> Iterator[Measurement]:
    n_tokens = scale.contexts[1] * scale.k_tokens
    for batch in scale.batches:
        for divisor in (4, 2):
            kept, rows = n_tokens // divisor, batch * scale.n_kv_heads
            nbytes = rows * kept * (2 * scale.layout().token_bytes)
            prepare = partial(_prepare, scale=scale, rows=rows, n_tokens=n_tokens, kept=kept)
            yield Measurement("compact", {"rows": rows, "tokens": n_tokens, "kept": kept}, prepare, nbytes)


def _prepare(device: torch.device, seed: int, *, scale: Scale, rows: int, n_tokens: int, kept: int) -> Prepared:
    from kvpress_kernels.compact import compact

    held = filled(device, scale.layout(), [n_tokens] * rows, seed)
    slots = torch.cat([torch.randperm(n_tokens, device=device)[:kept].sort().values for _ in range(rows)]).int()
    offsets = torch.arange(rows + 1, dtype=torch.int32, device=device) * kept
    return Prepared(lambda: compact(held.pages, held.page_table, held.lengths, slots, offsets))
