"""Store new tokens in a reduced space whose ranks differ from head to head, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress_kernels.pages import PageLayout, Pages
from kvpress_kernels.reference.append import append


def project_append(
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    pages: Sequence[Pages],
    page_table: Tensor,
    lengths: Tensor,
    ranks: Tensor,
    key_bases: Tensor,
    value_bases: Tensor,
    *,
    valid: Tensor | None = None,
) -> None:
    """Write K U_h and V W_h of the valid new tokens to the end of each row, and add their number to `lengths` in place.

    keys: [B, H, q, D], values: [B, H, q, Dv], any strides and float dtype. columns: [q] integer positions. pages: for every
    pair of ranks of a head, the pages of `PageLayout(P, rK, rV, dtype)`. page_table: [R, M] int64, where R = B * H in
    (sequence, KV head) order; it already names the pages that the new tokens need. lengths: [R] int32 stored tokens. ranks:
    [H, 2] int32, rK and rV of each head. key_bases: [H, D, RK], value_bases: [H, Dv, RV], of which head h uses the first
    rK and rV columns. valid: [B, q] bool, False for padding, which is not stored; None: all tokens are valid.

    Computed in float32, or in float64 for float64 tokens, and rounded when it is stored.
    """
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    by_layout, first = {part.layout: part for part in pages}, pages[0].layout
    for head, (key_rank, value_rank) in enumerate(ranks.tolist()):
        held = by_layout[PageLayout(first.page_size, key_rank, value_rank, first.dtype)]
        reduced_keys, reduced_values = (
            tensor[:, head : head + 1].to(wide) @ bases[head, :, :rank].to(wide)
            for tensor, bases, rank in ((keys, key_bases, key_rank), (values, value_bases, value_rank))
        )
        own = lengths[head :: len(ranks)]  # of the rows of this head; a view
        append(reduced_keys, reduced_values, columns, held, page_table[head :: len(ranks)], own, valid=valid)
