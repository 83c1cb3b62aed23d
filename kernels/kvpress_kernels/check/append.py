"""Cases of storing new tokens: copies, or codes by one formula, so every bit must be right."""

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
        for other in size.dims:
            make = partial(_trial, size=size, dtype=dtype, layout=PageLayout(page, other, other, dtype), n_tokens=1)
            yield Case("append", f"{name} D{other} 1 token", make)
        layout = PageLayout(page, dim, dim // 2, dtype)
        for n_tokens in (1, page + 3):
            for padding in (False, True):
                make = partial(_trial, size=size, dtype=dtype, layout=layout, n_tokens=n_tokens, padding=padding)
                yield Case("append", f"{name} D{dim}/{dim // 2} {n_tokens} tokens{' padding' if padding else ''}", make)
        codes = PageLayout(page, dim, dim // 2, torch.int8)
        for n_tokens in (1, page + 3):
            make = partial(_trial, size=size, dtype=dtype, layout=codes, n_tokens=n_tokens, padding=n_tokens > 1)
            yield Case("append", f"{name} int8 {n_tokens} tokens", make)
        if size.name == "full":
            make = partial(_trial, size=size, dtype=dtype, layout=layout, n_tokens=5, far=True)
            yield Case("append", f"{name} pages 2^31 elements apart", make)


def _trial(
    device: torch.device,
    *,
    size: Size,
    layout: PageLayout,
    dtype: torch.dtype,
    n_tokens: int,
    padding: bool = False,
    far: bool = False,
) -> Trial:
    from kvpress_kernels import append as kernel
    from kvpress_kernels.reference import append as reference

    counts = size.lengths(layout.page_size)
    batch = len(counts) // size.n_kv_heads
    # views of [B, q, Hkv, D], as projections leave them
    keys = normal((batch, n_tokens, size.n_kv_heads, layout.key_dim), dtype, device, seed=1).transpose(1, 2)
    values = normal((batch, n_tokens, size.n_kv_heads, layout.value_dim), dtype, device, seed=2).transpose(1, 2)
    columns = torch.arange(n_tokens, device=device) + 100_000
    valid = None
    if padding:
        valid = torch.rand(batch, n_tokens, generator=torch.Generator().manual_seed(3)) < 0.6
        valid[0] = False
    added = torch.full((batch,), n_tokens) if valid is None else valid.sum(1)
    after = [count + int(added[row // size.n_kv_heads]) for row, count in enumerate(counts)]
    on_device = None if valid is None else valid.to(device)

    def stored_by(append) -> Results:
        held = stored(device, layout, counts, room=n_tokens, far=far)
        append(keys, values, columns, held.pages, held.page_table, held.lengths, valid=on_device)
        return {**held.read(after)._asdict(), "lengths": held.lengths}

    allowed = dict.fromkeys(("keys", "values", "positions", "lengths"), 0.0)
    return Trial(lambda: stored_by(kernel.append), lambda: stored_by(reference.append), allowed)
