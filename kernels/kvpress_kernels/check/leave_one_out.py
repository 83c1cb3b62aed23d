"""Cases of what leaving out a page changes: usual pages, and pages that hold nearly all of the attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvpress_kernels.check.cases import RELATIVE, Case, Results, Trial
from kvpress_kernels.check.inputs import Size, Stored, normal, stored
from kvpress_kernels.pages import PageLayout, n_pages

#: what a change may be off by: it is a difference, of numbers that are rounded to float32
CHANGE_ERROR = 2e-5


def cases(size: Size) -> Iterator[Case]:
    page, dim, group = size.page_sizes[0], size.dims[0], size.groups[0]
    for dtype in size.dtypes:
        name = str(dtype).removeprefix("torch.")
        shapes = [(PageLayout(page, other, other, dtype), group) for other in size.dims]
        shapes += [(PageLayout(other, dim, dim, dtype), group) for other in size.page_sizes[1:]]
        shapes += [(PageLayout(page, dim, dim, dtype), other) for other in size.groups[1:]]
        for layout, heads in shapes:
            label = f"{name} D{layout.key_dim} P{layout.page_size} G{heads}"
            yield Case("leave_one_out", label, partial(_trial, size=size, layout=layout, group=heads))
        layout = PageLayout(page, dim, dim, dtype)
        options: dict[str, dict[str, Any]] = {"sinks": {"sinks": True}, "heavy pages": {"key_size": 6.0}}
        for label, changes in options.items():
            make = partial(_trial, size=size, layout=layout, group=group, **changes)
            yield Case("leave_one_out", f"{name} {label}", make)


def decoded(
    device: torch.device, size: Size, layout: PageLayout, group: int, sinks: bool, key_size: float = 1.0
) -> tuple[Stored, dict[str, Any]]:
    """Rows, and the arguments of leave_one_out as a decode step leaves them; NaN where those are undefined."""
    from kvpress_kernels.reference import ragged_decode

    held = stored(device, layout, size.lengths(layout.page_size), key_size=key_size)
    shape = (held.rows // size.n_kv_heads, size.n_kv_heads, group, layout.key_dim)
    query = normal(shape, torch.float64, device, seed=1)
    sink_logits = normal((size.n_kv_heads * group,), torch.float64, device, seed=2) if sinks else None
    found = ragged_decode.ragged_decode(
        query, held.pages, held.page_table, held.lengths,
        scale=layout.key_dim**-0.5, sinks=sink_logits, statistics="values",
    )  # fmt: skip
    assert found.page_lse is not None
    assert found.page_values is not None
    unused = ~used_pages(held)
    arguments = {
        "page_lse": found.page_lse.float().masked_fill(unused[..., None], torch.nan),
        "page_values": found.page_values.masked_fill(unused[..., None, None], torch.nan),
        "output_wide": found.output_wide.float(),
        "lse": found.lse.float(),
        "lengths": held.lengths,
        "page_size": layout.page_size,
        "sinks": None if sink_logits is None else sink_logits.float(),
    }
    return held, arguments


def used_pages(held: Stored) -> Tensor:
    """[R, M] pages that hold tokens."""
    pages = torch.arange(held.n_columns, device=held.lengths.device)
    return pages < n_pages(held.lengths, held.pages.layout.page_size)[:, None]


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def _trial(
    device: torch.device, *, size: Size, layout: PageLayout, group: int, sinks: bool = False, key_size: float = 1.0
) -> Trial:
    from kvpress_kernels import leave_one_out as kernel
    from kvpress_kernels.reference import leave_one_out as reference

    held, arguments = decoded(device, size, layout, group, sinks, key_size)
    used = used_pages(held)

    def run() -> Results:
        found = kernel.leave_one_out(**arguments)
        return {"mass": found.mass[used], "change": found.change[used]}

    def expected() -> Results:
        found = reference.leave_one_out(**widened(arguments))
        return {"mass": found.mass[used], "change": found.change[used]}

    return Trial(run, expected, {"mass": RELATIVE[torch.float32], "change": CHANGE_ERROR})
