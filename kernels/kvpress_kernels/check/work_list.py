"""Cases of cutting rows into items: integers, so every one of them must be right."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kvpress_kernels.check.cases import Case, Results, Trial
from kvpress_kernels.check.inputs import Size
from kvpress_kernels.reference.work_list import WorkList


def cases(size: Size) -> Iterator[Case]:
    page = size.page_sizes[0]
    rows = {"usual lengths": size.lengths(page), "no tokens": [0, 0, 0], "one long row": [0, 50 * page, 1, 0]}
    for label, counts in rows.items():
        for chunk in (1, 8):
            yield Case(
                "work_list", f"{label}, {chunk} pages an item", partial(_trial, counts=counts, page=page, chunk=chunk)
            )


def _trial(device: torch.device, *, counts: list[int], page: int, chunk: int) -> Trial:
    from kvpress_kernels import work_list as kernel
    from kvpress_kernels.reference import work_list as reference

    lengths = torch.tensor(counts, dtype=torch.int32, device=device)
    longest = -(-max(counts) // page) + 3

    def run() -> Results:
        return _tensors(kernel.work_list(lengths, page, longest, chunk))

    def expected() -> Results:
        return _tensors(reference.work_list(lengths, page, longest, chunk))

    return Trial(run, expected, {"row": 0.0, "first_page": 0.0, "first_item": 0.0})


def _tensors(found: WorkList) -> Results:
    used = found.row >= 0  # what stands in an item of no row is nobody's business
    return {"row": found.row, "first_page": found.first_page[used], "first_item": found.first_item}
