"""Cases of storing new tokens in a reduced space: numbers within a rounding, places and lengths to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from kvpress_kernels.check.cases import Case, Results, Trial, stored_half
from kvpress_kernels.check.inputs import Size, normal
from kvpress_kernels.check.lowrank_decode import bases, mixed_ranks, reduced

#: relative error of what codes stand for: next to a half, float32 and float64 may round to neighbouring codes
CODES = 2e-3


def cases(size: Size) -> Iterator[Case]:
    page, dim = size.page_sizes[0], size.dims[0]
    for dtype in size.dtypes:
        name = str(dtype).removeprefix("torch.")
        make = partial(_trial, size=size, dtype=dtype, page=page)
        for other in size.dims:
            yield Case("project_append", f"{name} D{other} 1 token", partial(make, dim=other))
        options: dict[str, dict[str, Any]] = {
            "int8 1 token": {"codes": True},
            f"{page + 3} tokens": {"n_tokens": page + 3},
            f"{page + 3} tokens padding": {"n_tokens": page + 3, "padding": True},
            "int8 5 tokens padding": {"n_tokens": 5, "padding": True, "codes": True},
        }
        if size.name == "full":
            options["pages 2^31 elements apart"] = {"far": True}
        for label, changes in options.items():
            yield Case("project_append", f"{name} {label}", partial(make, dim=dim, **changes))


def _trial(
    device: torch.device,
    *,
    size: Size,
    dtype: torch.dtype,
    page: int,
    dim: int,
    n_tokens: int = 1,
    padding: bool = False,
    codes: bool = False,
    far: bool = False,
) -> Trial:
    from kvpress_kernels import project_append as kernel
    from kvpress_kernels.reference import project_append as reference

    counts, heads = size.lengths(page), size.n_kv_heads
    batch, ranks = len(counts) // heads, [(dim // 2, dim // 2)] * heads if far else mixed_ranks(dim, heads)
    # views of [B, q, H, D], as projections leave them
    keys, values = (normal((batch, n_tokens, heads, dim), dtype, device, seed=i).transpose(1, 2) for i in (1, 2))
    key_bases, value_bases = (bases(device, dim, [pair[i] for pair in ranks], seed=i) for i in (0, 1))
    columns = torch.arange(n_tokens, device=device) + 100_000
    valid = None
    if padding:
        valid = torch.rand(batch, n_tokens, generator=torch.Generator().manual_seed(3)) < 0.6
        valid = valid.to(device)

    def stored_by(project_append, keys: torch.Tensor, values: torch.Tensor) -> Results:
        held = reduced(device, page, torch.int8 if codes else dtype, ranks, counts, room=n_tokens, far=far)
        pages, table, lengths = held.pages, held.page_table, held.lengths
        project_append(
            keys, values, columns, pages, table, lengths, held.ranks, key_bases, value_bases, valid=valid
        )  # fmt: skip
        rows = [held.read(row) for row in range(len(counts))]
        parts = (torch.cat([part.flatten() for part in parts]) for parts in zip(*rows, strict=True))
        return {**dict(zip(("keys", "values", "positions"), parts, strict=True)), "lengths": lengths}

    number = CODES if codes else stored_half(dtype)
    return Trial(
        lambda: stored_by(kernel.project_append, keys, values),
        lambda: stored_by(reference.project_append, keys.double(), values.double()),
        {"keys": number, "values": number, "positions": 0.0, "lengths": 0.0},
    )
