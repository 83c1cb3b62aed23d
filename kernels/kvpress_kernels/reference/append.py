"""Store new tokens behind those that each row already holds, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress_kernels.pages import Pages


def append(
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    pages: Pages,
    page_table: Tensor,
    lengths: Tensor,
    *,
    valid: Tensor | None = None,
) -> None:
    """Write the valid tokens of each sequence to the end of its rows, and add their number to `lengths` in place.

    keys: [B, Hkv, q, Dk], values: [B, Hkv, q, Dv], any strides and float dtype. columns: [q] integer positions, the
    same for all sequences. page_table: [R, M] int64, where R = B * Hkv in (sequence, KV head) order; it already names
    the pages that the new tokens need. lengths: [R] int32 stored tokens. valid: [B, q] bool, False for padding, which
    is not stored and takes no slot; None: all tokens are valid.
    """
    batch, n_kv, n_tokens, _ = keys.shape
    stored = torch.ones(batch, n_tokens, dtype=torch.bool, device=keys.device) if valid is None else valid
    stored = stored.repeat_interleave(n_kv, dim=0)  # [R, q]
    row, token = stored.nonzero(as_tuple=True)
    slot = lengths.long()[row] + stored.cumsum(1)[row, token] - 1
    size = pages.layout.page_size
    b, h = row // n_kv, row % n_kv
    pages.write(page_table[row, slot // size], slot % size, keys[b, h, token], values[b, h, token], columns[token])
    lengths += stored.sum(1, dtype=lengths.dtype)
