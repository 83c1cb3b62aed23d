"""Making a work list on the device: a handful of small launches, once for all layers of equal lengths."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kvpress_kernels.bench.measurement import Measurement, Prepared
from kvpress_kernels.bench.shapes import Scale


def measurements(scale: Scale, device: torch.device) -> Iterator[Measurement]:
    n_tokens, page = scale.contexts[-1] * scale.k_tokens, scale.page_sizes[0]
    for batch in scale.batches:
        rows = batch * scale.n_kv_heads
        items = rows * -(-n_tokens // page // 8)
        prepare = partial(_prepare, rows=rows, n_tokens=n_tokens, page=page)
        yield Measurement("work_list", {"rows": rows, "tokens": n_tokens}, prepare, 8 * items + 8 * rows, sets=8)


def _prepare(device: torch.device, seed: int, *, rows: int, n_tokens: int, page: int) -> Prepared:
    from kvpress_kernels.work_list import work_list

    generator = torch.Generator(device).manual_seed(seed)
    lengths = torch.randint(1, n_tokens + 1, (rows,), generator=generator, device=device, dtype=torch.int32)
    return Prepared(lambda: work_list(lengths, page, -(-n_tokens // page), 8))
