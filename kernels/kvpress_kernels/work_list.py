"""The work list of a balanced decode step, made on the device: every row cut into items of equally many pages.

Nothing here waits for the device, and the number of items follows from shapes alone, so a list can be made inside a
captured graph. It depends on page counts only: made from the tokens that rows have pages *reserved* for, it stays
right while those pages fill up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress_kernels.launch import CompileCase
from kvpress_kernels.pages import n_pages
from kvpress_kernels.reference.work_list import WorkList

#: pages of an item: 256 tokens in pages of 32
CHUNK_PAGES = 8
#: a longest row above this many times the mean is worth balancing ...
MAX_SKEW = 1.5
#: ... if there are at least this many tokens, since below that launching costs more than reading
MIN_TOKENS = 65536


def work_list(
    lengths: Tensor, page_size: int, max_pages: int, chunk_pages: int = CHUNK_PAGES, *, max_items: int | None = None
) -> WorkList:
    """Cut rows of `lengths` [R] tokens, on any device, into items of chunk_pages pages.

    max_pages: pages of the longest row that there may be. max_items: length of the list, which must not be smaller
    than the sum of ceil(pages / chunk_pages), as the host may know; by default what R rows of max_pages need.
    Lengths may be larger than what is stored: items beyond a row's end find nothing to do.
    """
    if page_size < 1 or chunk_pages < 1 or max_pages < 0:
        raise ValueError(f"{page_size} tokens a page, {chunk_pages} pages an item and {max_pages} pages make no list")
    total = lengths.numel() * -(-max_pages // chunk_pages) if max_items is None else max_items
    row_items = n_pages(n_pages(lengths, page_size), chunk_pages)  # [R]
    first_item = torch.nn.functional.pad(row_items.cumsum(0, dtype=torch.int32), (1, 0))
    item = torch.arange(total, dtype=torch.int32, device=lengths.device)
    # as many rows as end at or before the item
    row = torch.searchsorted(first_item[1:].contiguous(), item, right=True, out_int32=True)
    past_end = row == lengths.numel()
    first_page = (item - first_item[row]) * chunk_pages
    return WorkList(row.masked_fill(past_end, -1), first_page.masked_fill(past_end, 0), first_item, chunk_pages)


def prefers_work_list(lengths: Sequence[int]) -> bool:
    """Whether rows of these lengths should be decoded from a work list: uneven rows, and enough of them to matter.

    A rule of thumb that no measurement has confirmed: with equal splits a step lasts as long as its longest row, so the
    balanced grid can gain at most max / mean, and costs idle programs and a look-up for each.
    """
    total = sum(lengths)
    return total >= MIN_TOKENS and max(lengths) * len(lengths) > MAX_SKEW * total


def compile_cases(arch: str) -> list[CompileCase]:
    """None: the list is made by torch."""
    return []
