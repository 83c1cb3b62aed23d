"""Cases of the attention mass that tokens receive from all queries of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from kvpress_kernels.check.cases import LARGE_LOGIT, LARGE_LOGIT_ERROR, RELATIVE, Case, Results, Trial
from kvpress_kernels.check.inputs import Size, normal


def cases(size: Size) -> Iterator[Case]:
    long = 1000 if size.scale > 1 else 35
    options: dict[str, dict[str, Any]] = {
        "causal": {},
        "debiased": {"debias": True},
        "sinks": {"sinks": True},
        "softcap": {"softcap": 5.0},
        "queries of a chunk": {"n_queries": long // 3},
        "logits of 80": {"large": True},
    }
    for dtype in size.dtypes:
        name = str(dtype).removeprefix("torch.")
        for dim in size.dims:
            yield Case(
                "cumulative_mass", f"{name} D{dim}", partial(_trial, size=size, dtype=dtype, dim=dim, n_tokens=long)
            )
        for label, changes in options.items():
            make = partial(_trial, size=size, dtype=dtype, dim=size.dims[0], n_tokens=long, **changes)
            yield Case("cumulative_mass", f"{name} {label}", make)


def _trial(
    device: torch.device,
    *,
    size: Size,
    dtype: torch.dtype,
    dim: int,
    n_tokens: int,
    n_queries: int | None = None,
    debias: bool = False,
    sinks: bool = False,
    softcap: float | None = None,
    large: bool = False,
) -> Trial:
    from kvpress_kernels import cumulative_mass as kernel
    from kvpress_kernels.reference import cumulative_mass as reference

    group, n_queries = size.groups[0], n_queries or n_tokens
    query = normal((size.n_kv_heads, group, n_queries, dim), dtype, device, seed=1)
    keys = normal((size.n_kv_heads, n_tokens, dim), dtype, device, seed=2)
    positions = torch.arange(n_tokens, device=device) * 2
    query_positions = positions[n_tokens - n_queries :] + (torch.arange(n_queries, device=device) % 2)
    sink_logits = normal((size.n_kv_heads, group), torch.float32, device, seed=3) if sinks else None
    scale = dim**-0.5
    if large:
        scale = LARGE_LOGIT / float((query.double() @ keys.double()[:, None].transpose(2, 3)).abs().max())
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "debias": debias}

    def run() -> Results:
        return {"mass": kernel.cumulative_mass(query, keys, query_positions, positions, sinks=sink_logits, **options)}

    def expected() -> Results:
        wide_sinks = None if sink_logits is None else sink_logits.double()
        mass = reference.cumulative_mass(
            query.double(), keys.double(), query_positions, positions, sinks=wide_sinks, **options
        )
        return {"mass": mass}

    return Trial(run, expected, {"mass": max(RELATIVE[dtype], LARGE_LOGIT_ERROR if large else 0.0)})
