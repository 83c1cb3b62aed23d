"""Storing one new token of every sequence in half of the dimensions, next to a product and an `append` for each rank."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kvpress_kernels.bench.append import AT_MOST
from kvpress_kernels.bench.measurement import Measurement, Prepared
from kvpress_kernels.bench.shapes import Scale, filled, normal
from kvpress_kernels.check.lowrank_decode import bases
from kvpress_kernels.pages import PageLayout


def measurements(scale: Scale, device: torch.device) -> Iterator[Measurement]:
    for batch in scale.batches:
        for stored in (scale.dtype, torch.int8):
            rank, heads = scale.dim // 2, scale.n_kv_heads
            layout = PageLayout(scale.page_sizes[0], rank, rank, stored)
            # new tokens, the bases once, what is stored
            nbytes = batch * heads * (2 * scale.dim * scale.dtype.itemsize + layout.token_bytes)
            nbytes += 2 * 4 * heads * scale.dim * rank
            setting = {"batch": batch, "stored": str(stored).removeprefix("torch.")}
            prepare = partial(_prepare, scale=scale, batch=batch, layout=layout)
            yield Measurement("project_append", setting, prepare, nbytes, at_most=AT_MOST, sets=8)


def _prepare(device: torch.device, seed: int, *, scale: Scale, batch: int, layout: PageLayout) -> Prepared:
    from kvpress_kernels.append import append
    from kvpress_kernels.project_append import project_append

    heads, rank = scale.n_kv_heads, layout.key_dim
    # two launches a step are timed, and both make rows longer
    held = filled(device, layout, [scale.k_tokens] * batch * heads, seed, 2 * AT_MOST)
    shape = (batch, 1, heads, scale.dim)
    keys, values = (normal(shape, scale.dtype, device, seed + i).transpose(1, 2) for i in range(2))
    key_bases, value_bases = (bases(device, scale.dim, [rank] * heads, seed=2 * seed + i) for i in (0, 1))
    ranks = torch.full((heads, 2), rank, dtype=torch.int32, device=device)
    columns = torch.full((1,), scale.k_tokens, device=device)

    def launch() -> None:
        own = held.page_table, held.lengths, ranks, key_bases, value_bases
        project_append(keys, values, columns, [held.pages], *own)

    def apart() -> None:
        reduced_keys, reduced_values = (
            (x.float() @ basis).to(x.dtype) for x, basis in ((keys, key_bases), (values, value_bases))
        )
        append(reduced_keys, reduced_values, columns, held.pages, held.page_table, held.lengths)

    return Prepared(launch, {"product, then append": apart})
