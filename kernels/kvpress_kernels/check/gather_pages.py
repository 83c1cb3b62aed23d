"""Cases of moving kept tokens of a dense prompt into pages: copies, or codes by one formula, so every bit must be right."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kvpress_kernels.check.cases import Case, Results, Trial
from kvpress_kernels.check.inputs import Size, normal, stored
from kvpress_kernels.pages import PageLayout


def cases(size: Size) -> Iterator[Case]:
    page, dim = size.page_sizes[0], size.dims[0]
    for dtype in size.dtypes:
        name = str(dtype).removeprefix("torch.")
        layouts = [PageLayout(page, other, other, dtype) for other in size.dims]
        layouts += [PageLayout(other, dim, dim // 2, dtype) for other in size.page_sizes]
        for layout in layouts:
            label = f"{name} D{layout.key_dim}/{layout.value_dim} P{layout.page_size}"
            yield Case("gather_pages", label, partial(_trial, size=size, dtype=dtype, layout=layout))
        make = partial(_trial, size=size, dtype=dtype, layout=PageLayout(page, dim, dim, torch.int8))
        yield Case("gather_pages", f"{name} int8 D{dim} P{page}", make)
        if size.name == "full":
            make = partial(_trial, size=size, dtype=dtype, layout=layouts[0], far=True)
            yield Case("gather_pages", f"{name} pages 2^31 elements apart", make)


def _trial(device: torch.device, *, size: Size, layout: PageLayout, dtype: torch.dtype, far: bool = False) -> Trial:
    from kvpress_kernels import gather_pages as kernel
    from kvpress_kernels.reference import gather_pages as reference

    kept = size.lengths(layout.page_size)
    batch, n_tokens = len(kept) // size.n_kv_heads, max(kept) + 7
    keys = normal((batch, n_tokens, size.n_kv_heads, layout.key_dim), dtype, device, seed=1).transpose(1, 2)
    values = normal((batch, n_tokens, size.n_kv_heads, layout.value_dim), dtype, device, seed=2).transpose(1, 2)
    generator = torch.Generator().manual_seed(3)
    columns = torch.cat([torch.randperm(n_tokens, generator=generator)[:count].sort().values for count in kept])
    columns = columns.to(device=device, dtype=torch.int32)
    offsets = torch.tensor([0, *kept], device=device).cumsum(0).to(torch.int32)

    def stored_by(gather) -> Results:
        held = stored(device, layout, [0] * len(kept), room=max(kept), far=far)
        gather(keys, values, columns, offsets, held.pages, held.page_table, max_kept=max(kept))
        return held.read(kept)._asdict()

    allowed = dict.fromkeys(("keys", "values", "positions"), 0.0)
    return Trial(lambda: stored_by(kernel.gather_pages), lambda: stored_by(reference.gather_pages), allowed)
