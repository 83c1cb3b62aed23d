"""Close the gaps that evicted tokens leave, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress_kernels.pages import Pages


def compact(pages: Pages, page_table: Tensor, lengths: Tensor, kept: Tensor, offsets: Tensor) -> None:
    """Keep the tokens `kept[offsets[r] : offsets[r + 1]]` of each row r, in this order, and set `lengths` to their number.

    page_table: [R, M] int64. lengths: [R] int32 stored tokens, set in place. kept: [total] int32 slots, strictly
    ascending within a row and below its length. offsets: [R + 1] int32 ascending. Keys, values and positions move;
    slots behind the new length keep what they held.
    """
    size = pages.layout.page_size
    counts = offsets.diff()
    bounds = offsets.tolist()
    for row in range(len(bounds) - 1):
        source = kept[bounds[row] : bounds[row + 1]].long()
        target = torch.arange(len(source), device=kept.device)
        source, target = source[source != target], target[source != target]  # the others are where they belong
        old, new = ((page_table[row, slot // size], slot % size) for slot in (source, target))
        pages.move(old, new)
    lengths.copy_(counts)
