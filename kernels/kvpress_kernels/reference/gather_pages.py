"""Store the kept tokens of a dense prefill into pages, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress_kernels.pages import Pages


def gather_pages(
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    offsets: Tensor,
    pages: Pages,
    page_table: Tensor,
    *,
    max_kept: int,
) -> None:
    """Fill each row's pages with the tokens `columns[offsets[r] : offsets[r + 1]]` of its sequence, in this order.

    keys: [B, Hkv, n, Dk], values: [B, Hkv, n, Dv], any strides and float dtype. columns: [total] int32 indices below
    n, which become the positions. offsets: [R + 1] int32 ascending, where R = B * Hkv in (sequence, KV head) order.
    page_table: [R, M] int64, naming ceil(kept / P) pages of each row. max_kept: an upper bound of the tokens that a row
    keeps; ValueError where it is none. Lengths are the caller's.
    """
    n_kv, size = keys.shape[1], pages.layout.page_size
    counts = offsets.diff().long()  # [R]
    if counts.numel() and int(counts.max()) > max_kept:
        raise ValueError(f"a row keeps {int(counts.max())} tokens, more than the bound of {max_kept}")
    row = torch.arange(page_table.shape[0], device=keys.device).repeat_interleave(counts)
    index = torch.arange(row.numel(), device=keys.device)
    slot = index - (offsets[:-1] - offsets[0]).long()[row]
    column = columns[offsets[0] + index].long()
    b, h = row // n_kv, row % n_kv
    pages.write(page_table[row, slot // size], slot % size, keys[b, h, column], values[b, h, column], column)
