"""Attention of one new token per sequence over pages of a reduced space, with ranks of each KV head: the plain torch form.

KV head h has orthonormal columns U_h [D, rK_h] and W_h [Dv, rV_h]; its pages hold K U_h and V W_h (arXiv 2410.14731,
MatryoshkaKV). With the model's own scale,

    output = softmax(scale * (q U_h) (K U_h)^T) (V W_h) W_h^T + lost_h

which is attention over the projected K U_h U_h^T and V W_h W_h^T; neither is ever made. lost_h is a constant of the head,
what the projection takes from the mean of its values, say; it is added once, whatever the weights sum to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress_kernels.pages import PageLayout, Pages
from kvpress_kernels.reference.ragged_decode import ragged_decode
from kvpress_kernels.reference.work_list import WorkList


def lowrank_decode(
    query: Tensor,
    pages: Sequence[Pages],
    page_table: Tensor,
    lengths: Tensor,
    ranks: Tensor,
    key_bases: Tensor,
    value_bases: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lost: Tensor | None = None,
    work: WorkList | None = None,
) -> Tensor:
    """`softmax(scale * q U (K U)^T) (V W) W^T + lost` over each row's pages.

    Args:
        query: [B, H, G, D], one token per sequence; row r = b * H + h.
        pages: for every pair of ranks of a head, the pages of `PageLayout(P, rK, rV, dtype)`, all with one anchor.
        page_table: [R, M] int64 entries. lengths: [R] stored tokens, 0 to M * P; nothing at or beyond them is read.
        ranks: [H, 2] int32, rK and rV of each head, multiples of 8.
        key_bases: [H, D, RK], value_bases: [H, Dv, RV]; zero in the columns from a head's rank on.
        scale: factor of the logits. softcap: logits become softcap * tanh(logits / softcap).
        sinks: [H * G] logits that join the denominator with value 0.
        lost: [H, Dv], added to the output of every row of its head, of an empty one too.
        work: how the kernel divides the rows; without effect here.

    Returns:
        [B, H, G, Dv] in the query's dtype, computed in float32, or in float64 for a float64 query.
    """
    batch, n_kv_heads, group, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    by_layout = {part.layout: part for part in pages}
    outputs = []
    for head, (key_rank, value_rank) in enumerate(ranks.tolist()):
        held = by_layout[PageLayout(pages[0].layout.page_size, key_rank, value_rank, pages[0].layout.dtype)]
        own = slice(head, None, n_kv_heads)  # rows of this head
        reduced = query[:, head].to(wide) @ key_bases[head, :, :key_rank].to(wide)  # [B, G, rK]
        found = ragged_decode(
            reduced[:, None],
            held,
            page_table[own],
            lengths[own],
            scale=scale,
            softcap=softcap,
            sinks=None if sinks is None else sinks.view(n_kv_heads, group)[head].to(wide),
        )
        output = found.output_wide @ value_bases[head, :, :value_rank].to(wide).T  # [B, G, Dv]
        outputs.append(output if lost is None else output + lost[head].to(wide))
    return torch.stack(outputs, 1).view(batch, n_kv_heads, group, -1).to(query.dtype)
