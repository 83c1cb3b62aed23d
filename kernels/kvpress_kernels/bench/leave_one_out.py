"""Mass and output change of every page, from what a decode step left."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kvpress_kernels.bench.measurement import Measurement, Prepared
from kvpress_kernels.bench.shapes import Scale, normal


def measurements(scale: Scale, device: torch.device) -> Iterator[Measurement]:
    columns = scale.contexts[-1] * scale.k_tokens // scale.page_sizes[0]
    for batch in scale.batches:
        rows = batch * scale.n_kv_heads
        nbytes = read_bytes(scale, rows, columns) + 8 * rows * scale.group * columns
        prepare = partial(_prepare, scale=scale, rows=rows, columns=columns)
        yield Measurement("leave_one_out", {"rows": rows, "pages": columns}, prepare, nbytes)


def read_bytes(scale: Scale, rows: int, columns: int, share: float = 1.0) -> int:
    """Bytes of the statistics of a step: log-sum-exps twice, a share of the mean values, the output."""
    per_page = 8 + int(share * scale.dim * scale.dtype.itemsize)
    return rows * scale.group * (columns * per_page + 4 * scale.dim + 4)


def statistics_of_a_step(
    device: torch.device, seed: int, scale: Scale, rows: int, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """Arguments as `ragged_decode` leaves them: page_lse, page_values, output_wide, lse, lengths, page size."""
    page_lse = normal((rows, columns, scale.group), torch.float32, device, seed)
    page_values = normal((rows, columns, scale.group, scale.dim), scale.dtype, device, seed + 1)
    output = normal((rows, scale.group, scale.dim), torch.float32, device, seed + 2)
    lengths = torch.full((rows,), columns * scale.page_sizes[0], dtype=torch.int32, device=device)
    return page_lse, page_values, output, page_lse.logsumexp(1), lengths, scale.page_sizes[0]


def _prepare(device: torch.device, seed: int, *, scale: Scale, rows: int, columns: int) -> Prepared:
    from kvpress_kernels.leave_one_out import leave_one_out

    arguments = statistics_of_a_step(device, seed, scale, rows, columns)
    return Prepared(lambda: leave_one_out(*arguments))
