"""Close the gaps that evicted tokens leave, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress_kernels.pages import Pages, n_pages


def compact(pages: Pages, page_table: Tensor, lengths: Tensor, kept: Tensor, offsets: Tensor) -> None:
    """Keep the tokens `kept[offsets[r] : offsets[r + 1]]` of each row r, in this order, and set `lengths` to their number.

    page_table: [R, M] int64. lengths: [R] int32 stored tokens, set in place. kept: [total] int32 slots, strictly
    ascending within a row and below its length. offsets: [R + 1] int32 ascending. Keys, values and positions move;
    slots behind the new length keep what they held.
    """
    size = pages.layout.page_size
    counts = offsets.diff()
    bounds = offsets.tolist()
    for row, used in enumerate(n_pages(lengths, size).tolist()):
        source = kept[bounds[row] : bounds[row + 1]].long()
        target = torch.arange(len(source), device=kept.device)
        source, target = source[source != target], target[source != target]  # the others are where they belong
        held = pages.read(
            page_table[row, :used]
        )  # of codes what they stand for, which is written as the same codes again
        keys, values, positions = (part.flatten(0, 1)[source] for part in held)
        pages.write(page_table[row, target // size], target % size, keys, values, positions)
    lengths.copy_(counts)
