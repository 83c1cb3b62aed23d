"""Joining partial results, as a decode step of many splits leaves them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kvpress_kernels.bench.measurement import Measurement, Prepared
from kvpress_kernels.bench.shapes import Scale, normal


def measurements(scale: Scale, device: torch.device) -> Iterator[Measurement]:
    for batch in scale.batches:
        for splits in (4, 32):
            rows = batch * scale.n_kv_heads
            read = 4 * rows * splits * scale.group * (scale.dim + 2)
            written = rows * scale.group * (scale.dim * (4 + scale.dtype.itemsize) + 4)
            prepare = partial(_prepare, scale=scale, rows=rows, splits=splits)
            yield Measurement("split_reduce", {"rows": rows, "splits": splits}, prepare, read + written)


def _prepare(device: torch.device, seed: int, *, scale: Scale, rows: int, splits: int) -> Prepared:
    from kvpress_kernels.split_reduce import split_reduce

    output = normal((rows * splits, scale.group, scale.dim), torch.float32, device, seed)
    largest = normal((rows * splits, scale.group), torch.float32, device, seed + 1)
    sums = largest.exp2()
    return Prepared(lambda: split_reduce(output, largest, sums, splits, n_kv_heads=scale.n_kv_heads, dtype=scale.dtype))
