"""Cases of the scores of a window of queries: all statistics, tokens and blocks, both reducers, a value basis."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from kvpress_kernels.check.cases import RELATIVE, Case, Results, Trial
from kvpress_kernels.check.inputs import Size, normal

SUMS = ("mass", "mass_squared", "coverage")
CHANGES = ("change@0", "change@1")
#: a change is a difference of squares: half precision keeps about half of its digits
CHANGE_ERROR = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-5}
#: tokens near the share of uniform attention may fall on either side of it: this share of all weight may move
COVERAGE_ERROR = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 2e-3}


def cases(size: Size) -> Iterator[Case]:
    options: dict[str, dict[str, Any]] = {
        "sums": {"statistics": SUMS},
        "changes": {"statistics": CHANGES},
        "all, maximum": {"statistics": SUMS + CHANGES, "reducer": "max"},
        "all, blocks": {"statistics": SUMS + CHANGES, "block": 16},
        "all, blocks, maximum": {"statistics": SUMS + CHANGES, "block": 16, "reducer": "max"},
        "all, sinks": {"statistics": SUMS + CHANGES, "sinks": True},
        "all, softcap": {"statistics": SUMS + CHANGES, "softcap": 5.0},
        "changes, value basis": {"statistics": CHANGES, "basis": True},
    }
    for dtype in size.dtypes:
        name = str(dtype).removeprefix("torch.")
        for dim in size.dims[1:]:
            make = partial(_trial, size=size, dtype=dtype, dim=dim, statistics=("mass", "change@1"))
            yield Case("window_scores", f"{name} D{dim}", make)
        for label, changes in options.items():
            make = partial(_trial, size=size, dtype=dtype, dim=size.dims[0], **changes)
            yield Case("window_scores", f"{name} {label}", make)


def _trial(
    device: torch.device,
    *,
    size: Size,
    dtype: torch.dtype,
    dim: int,
    statistics: tuple[str, ...],
    reducer: str = "sum",
    block: int | None = None,
    sinks: bool = False,
    softcap: float | None = None,
    basis: bool = False,
) -> Trial:
    from kvpress_kernels import window_scores as kernel
    from kvpress_kernels.reference import window_scores as reference

    n_tokens, n_queries = (3000, 64) if size.scale > 1 else (37, 5)
    n_heads, group = size.n_kv_heads, size.groups[0]
    query = normal((n_heads, group, n_queries, dim), dtype, device, seed=1)
    keys = normal((n_heads, n_tokens, dim), dtype, device, seed=2)
    values = normal((n_heads, n_tokens, dim), dtype, device, seed=3)
    positions = torch.arange(n_tokens, device=device)
    query_positions = positions[-n_queries:]
    weights = torch.rand(n_queries, generator=torch.Generator().manual_seed(4)).to(device)
    weights[1] = 0.0
    slots = None
    if block is not None:
        slots = torch.arange(-(-n_tokens // block) * block, device=device).view(-1, block)
        slots = slots.where(slots < n_tokens, -1)
    sink_logits = normal((n_heads, group), torch.float32, device, seed=5) if sinks else None
    value_basis = normal((n_heads, group, dim, 8), torch.float32, device, seed=6) if basis else None
    options: dict[str, Any] = {
        "scale": dim**-0.5, "statistics": statistics, "unit_slots": slots, "reducer": reducer, "softcap": softcap,
    }  # fmt: skip

    def run() -> Results:
        return kernel.window_scores(
            query, keys, values, query_positions, positions, weights,
            sinks=sink_logits, value_basis=value_basis, **options,
        )  # fmt: skip

    def expected() -> Results:
        return reference.window_scores(
            query.double(), keys.double(), values.double(), query_positions, positions, weights.double(),
            sinks=None if sink_logits is None else sink_logits.double(),
            value_basis=None if value_basis is None else value_basis.double(), **options,
        )  # fmt: skip

    def allowed(name: str) -> float:
        if name.startswith("change"):
            return CHANGE_ERROR[dtype]
        return COVERAGE_ERROR[dtype] if name == "coverage" else 2 * RELATIVE[dtype]

    return Trial(run, expected, {name: allowed(name) for name in statistics})
