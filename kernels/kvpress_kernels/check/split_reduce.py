"""Cases of joining partial results: items without pages, rows without items, sinks, unequal numbers of items."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kvpress_kernels.check.cases import RELATIVE, Case, Results, Trial, stored_half
from kvpress_kernels.check.inputs import Size, normal

#: maxima of up to 80 powers of two round by 4e-6
LOG_ERROR = 2e-5


def cases(size: Size) -> Iterator[Case]:
    items = [0, 1, 2, 5, 17, 33, 1, 3] if size.scale > 1 else [0, 1, 17, 2]
    equal = [33] * 2 * size.n_kv_heads if size.scale > 1 else [2] * size.n_kv_heads
    for dtype in size.dtypes:
        name = str(dtype).removeprefix("torch.")
        for dim in size.dims:
            make = partial(_trial, size=size, dtype=dtype, dim=dim, items=items, sinks=True)
            yield Case("split_reduce", f"{name} D{dim} sinks", make)
        for label, counts in {"unequal items": items, "equal items": equal}.items():
            make = partial(_trial, size=size, dtype=dtype, dim=size.dims[0], items=counts, sinks=False)
            yield Case("split_reduce", f"{name} {label}", make)


def _trial(device: torch.device, *, size: Size, dtype: torch.dtype, dim: int, items: list[int], sinks: bool) -> Trial:
    from kvpress_kernels import split_reduce as kernel
    from kvpress_kernels.reference import split_reduce as reference

    group, total = size.groups[0], sum(items)
    output = normal((total, group, dim), torch.float32, device, seed=0, size=3.0)
    largest = normal((total, group), torch.float32, device, seed=1, size=20.0)
    sums = normal((total, group), torch.float32, device, seed=2).abs() + 1.0
    empty = torch.arange(total, device=device) % 5 == 1  # items that found no pages have written no output
    output[empty], largest[empty], sums[empty] = torch.nan, -torch.inf, 0.0
    first_item = torch.tensor([0, *items], device=device).cumsum(0).to(torch.int32)
    sink_logits = normal((size.n_kv_heads * group,), torch.float32, device, seed=3, size=5.0) if sinks else None

    def run() -> Results:
        found = kernel.split_reduce(
            output, largest, sums, first_item, group_sinks=sink_logits, n_kv_heads=size.n_kv_heads, dtype=dtype
        )
        return found._asdict()

    def expected() -> Results:
        found = reference.split_reduce(
            output.double(), largest.double(), sums.double(), first_item,
            group_sinks=None if sink_logits is None else sink_logits.double(),
            n_kv_heads=size.n_kv_heads, dtype=torch.float64,
        )  # fmt: skip
        return found._asdict()

    exact = RELATIVE[torch.float32]
    allowed = {"output": max(exact, stored_half(dtype)), "output_wide": exact, "lse": LOG_ERROR}
    return Trial(run, expected, allowed, frozenset({"lse"}))
