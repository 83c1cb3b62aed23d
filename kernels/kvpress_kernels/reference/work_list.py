"""The work list of a balanced decode step: every row cut into items of equally many pages.

Rows of different lengths then keep all processors busy until the end, where a fixed number of parts a row would wait
for the longest one (the flat work list of flash-decoding).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kvpress_kernels.pages import n_pages


class WorkList(NamedTuple):
    """I items in row order, for R rows.

    row: [I] int32, -1 for items past the end. first_page: [I] int32, first column of the page table; an item has
    `chunk_pages` pages, or what is left of its row. first_item: [R + 1] int32; row r has the items
    first_item[r] to first_item[r + 1] - 1.
    """

    row: Tensor
    first_page: Tensor
    first_item: Tensor
    chunk_pages: int


def work_list(
    lengths: Tensor, page_size: int, max_pages: int, chunk_pages: int, *, max_items: int | None = None
) -> WorkList:
    """Cut rows of `lengths` [R] tokens into items of chunk_pages pages.

    max_pages: pages of the longest row that there may be. max_items: I; by default what R rows of max_pages need.
    Lengths may be larger than what is stored: items beyond a row's end find nothing to do.
    """
    row: list[int] = []
    first_page: list[int] = []
    first_item = [0]
    for r, used in enumerate(n_pages(lengths, page_size).tolist()):
        starts = range(0, used, chunk_pages)
        row += [r] * len(starts)
        first_page += starts
        first_item.append(len(row))
    total = lengths.numel() * -(-max_pages // chunk_pages) if max_items is None else max_items
    row += [-1] * (total - len(row))
    first_page += [0] * (total - len(first_page))
    as_tensor = partial(torch.tensor, dtype=torch.int32, device=lengths.device)
    return WorkList(as_tensor(row), as_tensor(first_page), as_tensor(first_item), chunk_pages)
