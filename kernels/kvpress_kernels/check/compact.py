"""Cases of moving kept tokens forward in their pages: copies, so every bit must be right."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kvpress_kernels.check.cases import Case, Results, Trial
from kvpress_kernels.check.inputs import Size, stored
from kvpress_kernels.pages import PageLayout

#: share of the tokens that a case keeps
SHARES = {"all": 1.0, "half": 0.5, "a tenth": 0.1, "none": 0.0}


def cases(size: Size) -> Iterator[Case]:
    page, dim = size.page_sizes[0], size.dims[0]
    for dtype in size.dtypes:
        name = str(dtype).removeprefix("torch.")
        layouts = [PageLayout(page, other, other, dtype) for other in size.dims]
        layouts += [PageLayout(other, dim, dim // 2, dtype) for other in size.page_sizes]
        for layout in layouts:
            label = f"{name} D{layout.key_dim}/{layout.value_dim} P{layout.page_size} half"
            yield Case("compact", label, partial(_trial, size=size, layout=layout, share=0.5))
        for label, share in SHARES.items():
            if label != "half":
                yield Case("compact", f"{name} {label}", partial(_trial, size=size, layout=layouts[0], share=share))
        if dtype == size.dtypes[0]:
            codes = PageLayout(page, dim, dim, torch.int8)
            yield Case("compact", f"int8 D{dim} P{page} half", partial(_trial, size=size, layout=codes, share=0.5))
        if size.name == "full":
            make = partial(_trial, size=size, layout=layouts[0], share=0.5, far=True)
            yield Case("compact", f"{name} pages 2^31 elements apart", make)


def _trial(device: torch.device, *, size: Size, layout: PageLayout, share: float, far: bool = False) -> Trial:
    from kvpress_kernels import compact as kernel
    from kvpress_kernels.reference import compact as reference

    counts = size.lengths(layout.page_size)
    generator = torch.Generator().manual_seed(3)
    chosen = [torch.randperm(count, generator=generator)[: round(share * count)].sort().values for count in counts]
    kept = torch.cat(chosen).to(device=device, dtype=torch.int32)
    after = [len(part) for part in chosen]
    offsets = torch.tensor([0, *after], device=device).cumsum(0).to(torch.int32)

    def compacted_by(compact) -> Results:
        held = stored(device, layout, counts, far=far)
        compact(held.pages, held.page_table, held.lengths, kept, offsets)
        return {**held.read(after)._asdict(), "lengths": held.lengths}

    allowed = dict.fromkeys(("keys", "values", "positions", "lengths"), 0.0)
    return Trial(lambda: compacted_by(kernel.compact), lambda: compacted_by(reference.compact), allowed)
