"""Decode attention: batch x context x page size x statistics, and heads of unequal length with and without a work list."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kvpress_kernels.bench import baselines
from kvpress_kernels.bench.measurement import Measurement, Prepared
from kvpress_kernels.bench.shapes import Scale, filled, normal
from kvpress_kernels.check.cases import RELATIVE, difference
from kvpress_kernels.launch import n_processors
from kvpress_kernels.pages import PageLayout
from kvpress_kernels.reference.ragged_decode import Statistics

#: pages of an item of the work list
CHUNK_PAGES = 8
SKEWS = (1, 2, 4)


def measurements(scale: Scale, device: torch.device) -> Iterator[Measurement]:
    for batch in scale.batches:
        for context in scale.contexts:
            for page_size in scale.page_sizes:
                for statistics in ("none", "lse", "values"):
                    layout, n_tokens = scale.layout(page_size), context * scale.k_tokens
                    counts = [n_tokens] * batch * scale.n_kv_heads
                    first = (page_size, statistics) == (scale.page_sizes[0], "none")
                    setting = {"batch": batch, "tokens": n_tokens, "page": page_size, "statistics": statistics}
                    prepare = partial(
                        _prepare, scale=scale, layout=layout, counts=counts, statistics=statistics, others=first
                    )
                    nbytes = decode_bytes(layout, counts, scale.group, statistics, n_processors(device))
                    yield Measurement("ragged_decode", setting, prepare, nbytes)
            layout, n_tokens = scale.layout(dtype=torch.int8), context * scale.k_tokens
            counts = [n_tokens] * batch * scale.n_kv_heads
            nbytes = decode_bytes(layout, counts, scale.group, "none", n_processors(device), dtype=scale.dtype)
            prepare = partial(_prepare, scale=scale, layout=layout, counts=counts, statistics="none")
            yield Measurement("ragged_decode", {"batch": batch, "tokens": n_tokens, "stored": "int8"}, prepare, nbytes)
    batch, mean = scale.batches[len(scale.batches) // 2], scale.contexts[1] * scale.k_tokens
    for skew in SKEWS:
        if skew > scale.n_kv_heads:
            continue
        counts = skewed(mean, skew, scale.n_kv_heads) * batch
        for balanced in (False, True):
            layout = scale.layout()
            grid = "balanced" if balanced else "plain"
            setting = {"batch": batch, "mean tokens": mean, "longest / mean": skew, "grid": grid}
            prepare = partial(_prepare, scale=scale, layout=layout, counts=counts, statistics="none", balanced=balanced)
            nbytes = decode_bytes(layout, counts, scale.group, "none", n_processors(device), balanced)
            yield Measurement("ragged_decode", setting, prepare, nbytes)


def skewed(mean: int, skew: int, n_heads: int) -> list[int]:
    """Lengths of n_heads heads of this mean, of which one has `skew` times as much."""
    rest = (n_heads - skew) * mean // max(n_heads - 1, 1)
    return [skew * mean, *[rest] * (n_heads - 1)]


def decode_bytes(
    layout: PageLayout,
    counts: list[int],
    group: int,
    statistics: Statistics,
    processors: int,
    balanced: bool = False,
    dtype: torch.dtype | None = None,
) -> int:
    """Bytes that a step reads and writes: K and V, table, query, partial results twice, results, statistics.

    dtype: of the query, that of the pages by default.
    """
    from kvpress_kernels.decode_launch import n_splits

    item, rows = (dtype or layout.dtype).itemsize, len(counts)
    used = [-(-count // layout.page_size) for count in counts]
    splits = sum(-(-n // CHUNK_PAGES) for n in used) if balanced else rows * n_splits(rows, max(used), processors)
    stored = sum(counts) * (layout.token_bytes - 4) + 8 * sum(used)
    partials = 2 * 4 * splits * group * (layout.value_dim + 2)
    results = rows * group * (layout.key_dim * item + layout.value_dim * (item + 4) + 4)
    per_page = {"none": 0, "lse": 4, "values": 4 + layout.value_dim * item}[statistics]
    return stored + partials + results + sum(used) * group * per_page


def _prepare(
    device: torch.device,
    seed: int,
    *,
    scale: Scale,
    layout: PageLayout,
    counts: list[int],
    statistics: Statistics,
    others: bool = False,
    balanced: bool = False,
) -> Prepared:
    from kvpress_kernels.ragged_decode import ragged_decode
    from kvpress_kernels.work_list import work_list

    held = filled(device, layout, counts, seed)
    shape = (len(counts) // scale.n_kv_heads, scale.n_kv_heads, scale.group, scale.dim)
    query, factor = normal(shape, scale.dtype, device, seed), scale.dim**-0.5
    work = None
    if balanced:
        used = [-(-count // layout.page_size) for count in counts]
        items = sum(-(-n // CHUNK_PAGES) for n in used)
        work = work_list(held.lengths, layout.page_size, max(used), CHUNK_PAGES, max_items=items)

    def launch() -> torch.Tensor:
        return ragged_decode(
            query, held.pages, held.page_table, held.lengths, scale=factor, statistics=statistics, work=work
        ).output

    if not others:
        return Prepared(launch)
    keys, values = (part.view(*shape[:2], counts[0], scale.dim) for part in held.dense())
    launches = baselines.decode(query, keys, values, factor)

    def agree() -> tuple[float, float]:
        sdpa = launches["sdpa packed"]
        assert not isinstance(sdpa, str)
        # both round their output once
        return difference(launch(), sdpa()), 2 * RELATIVE[layout.dtype]  # type: ignore[arg-type]

    return Prepared(launch, launches, agree)
