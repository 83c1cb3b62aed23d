"""Cases of turning stored keys back: whole and partial rotary dimensions; values and positions stay bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kvpress_kernels.check.cases import Case, Results, Trial, stored_half
from kvpress_kernels.check.inputs import Size, stored
from kvpress_kernels.pages import PageLayout

ROPE_BASE = 10_000.0


def cases(size: Size) -> Iterator[Case]:
    page, dim = size.page_sizes[0], size.dims[0]
    for dtype in size.dtypes:
        name = str(dtype).removeprefix("torch.")
        for other in size.dims:
            make = partial(_trial, size=size, layout=PageLayout(page, other, other, dtype), rotary=other)
            yield Case("rerotate", f"{name} D{other}", make)
        for other in size.page_sizes[1:]:
            make = partial(_trial, size=size, layout=PageLayout(other, dim, dim, dtype), rotary=dim)
            yield Case("rerotate", f"{name} D{dim} P{other}", make)
        make = partial(_trial, size=size, layout=PageLayout(page, dim, dim // 2, dtype), rotary=dim // 2)
        yield Case("rerotate", f"{name} D{dim}/{dim // 2}, half of it rotary", make)
        if size.name == "full":
            make = partial(_trial, size=size, layout=PageLayout(page, dim, dim, dtype), rotary=dim, far=True)
            yield Case("rerotate", f"{name} pages 2^31 elements apart", make)


def _trial(device: torch.device, *, size: Size, layout: PageLayout, rotary: int, far: bool = False) -> Trial:
    from kvpress_kernels import rerotate as kernel
    from kvpress_kernels.reference import rerotate as reference

    counts = size.lengths(layout.page_size)
    longest = max(counts) + 1
    frequencies = ROPE_BASE ** (-torch.arange(0, rotary, 2) / rotary)
    angles = torch.arange(longest)[:, None] * frequencies
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    columns = -(-max(counts) // layout.page_size) * layout.page_size
    generator = torch.Generator().manual_seed(4)
    shifts = torch.randint(0, longest, (len(counts), columns), generator=generator, dtype=torch.int32).to(device)

    def turned_by(rerotate) -> Results:
        held = stored(device, layout, counts, far=far)
        rerotate(held.pages, held.page_table, held.lengths, shifts, cos, sin)
        return held.read()._asdict()

    allowed = {"keys": stored_half(layout.dtype), "values": 0.0, "positions": 0.0}
    return Trial(lambda: turned_by(kernel.rerotate), lambda: turned_by(reference.rerotate), allowed)
