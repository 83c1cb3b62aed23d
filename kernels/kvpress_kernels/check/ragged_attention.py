"""Cases of several new tokens a row over pages, some of which lie in a query's future."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from kvpress_kernels.check.cases import LARGE_LOGIT, LARGE_LOGIT_ERROR, Case, Results, Trial, stored_half
from kvpress_kernels.check.inputs import Size, normal, stored
from kvpress_kernels.pages import PageLayout


def cases(size: Size) -> Iterator[Case]:
    page, dim, group = size.page_sizes[0], size.dims[0], size.groups[0]
    some = 37 if size.scale > 1 else 5
    options: dict[str, dict[str, Any]] = {
        "1 query": {"n_queries": 1},
        "sinks": {"sinks": True},
        "softcap": {"softcap": 5.0},
        "logits of 80": {"large": True},
        "int8": {"stored": torch.int8},
        "int8 sinks, softcap": {"sinks": True, "softcap": 5.0, "stored": torch.int8},
    }
    for dtype in size.dtypes:
        name = str(dtype).removeprefix("torch.")
        shapes = [(PageLayout(page, other, other, dtype), group) for other in size.dims]
        shapes += [(PageLayout(other, dim, dim, dtype), group) for other in size.page_sizes[1:]]
        shapes += [(PageLayout(page, dim, dim // 2, dtype), other) for other in size.groups]
        for layout, heads in shapes:
            label = f"{name} D{layout.key_dim}/{layout.value_dim} P{layout.page_size} G{heads}"
            make = partial(_trial, size=size, layout=layout, dtype=dtype, group=heads, n_queries=some)
            yield Case("ragged_attention", label, make)
        layout = PageLayout(page, dim, dim, dtype)
        if size.name == "full":
            options["pages 2^31 elements apart"] = {"far": True}
            options["500 queries"] = {"n_queries": 500}
        for label, changes in options.items():
            arguments: dict[str, Any] = {"size": size, "layout": layout, "group": group, "n_queries": some} | changes
            arguments["layout"] = replace(layout, dtype=arguments.pop("stored", dtype))
            arguments["dtype"] = dtype
            yield Case("ragged_attention", f"{name} {label}", partial(_trial, **arguments))


def _trial(
    device: torch.device,
    *,
    size: Size,
    layout: PageLayout,
    dtype: torch.dtype,
    group: int,
    n_queries: int,
    sinks: bool = False,
    softcap: float | None = None,
    large: bool = False,
    far: bool = False,
) -> Trial:
    from kvpress_kernels import ragged_attention as kernel
    from kvpress_kernels.reference import ragged_attention as reference

    counts = size.lengths(layout.page_size)
    held = stored(device, layout, counts, far=far)
    shape = (len(counts) // size.n_kv_heads, size.n_kv_heads, group, n_queries, layout.key_dim)
    query = normal(shape, dtype, device, seed=1)
    tokens = held.read()
    # from a query that sees no token of any row to one that sees all of them
    last = int(tokens.positions.max())
    query_positions = (
        torch.linspace(-1, last, n_queries).long().to(device) if n_queries > 1 else torch.tensor([last], device=device)
    )
    scale = layout.key_dim**-0.5
    if large:
        row, _ = held.slots()
        logits = torch.einsum("ngqd,nd->ngq", query.double().flatten(0, 1)[row], tokens.keys.double())
        scale = LARGE_LOGIT / float(logits.abs().max())
    sink_logits = normal((size.n_kv_heads * group,), torch.float32, device, seed=2) if sinks else None
    options: dict[str, Any] = {"scale": scale, "softcap": softcap}

    def run() -> Results:
        output = kernel.ragged_attention(
            query, held.pages, held.page_table, held.lengths, query_positions, sinks=sink_logits, **options
        )
        return {"output": output}

    def expected() -> Results:
        wide_sinks = None if sink_logits is None else sink_logits.double()
        output = reference.ragged_attention(
            query.double(), held.pages, held.page_table, held.lengths, query_positions, sinks=wide_sinks, **options
        )
        return {"output": output}

    return Trial(run, expected, {"output": max(stored_half(dtype), LARGE_LOGIT_ERROR if large else 0.0)})
