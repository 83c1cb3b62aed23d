"""The exact output change of a set of pages, from what a decode step left."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kvpress_kernels.bench.leave_one_out import read_bytes, statistics_of_a_step
from kvpress_kernels.bench.measurement import Measurement, Prepared
from kvpress_kernels.bench.shapes import Scale


def measurements(scale: Scale, device: torch.device) -> Iterator[Measurement]:
    columns = scale.contexts[-1] * scale.k_tokens // scale.page_sizes[0]
    for batch in scale.batches:
        rows = batch * scale.n_kv_heads
        # half of the pages go, and only the values of one side are read
        nbytes = read_bytes(scale, rows, columns, 0.5) + rows * columns + 4 * rows * scale.group
        prepare = partial(_prepare, scale=scale, rows=rows, columns=columns)
        yield Measurement("joint_change", {"rows": rows, "pages": columns}, prepare, nbytes)


def _prepare(device: torch.device, seed: int, *, scale: Scale, rows: int, columns: int) -> Prepared:
    from kvpress_kernels.joint_change import joint_change

    arguments = statistics_of_a_step(device, seed, scale, rows, columns)
    removed = torch.rand(rows, columns, device=device) < 0.5
    return Prepared(lambda: joint_change(*arguments, removed))
