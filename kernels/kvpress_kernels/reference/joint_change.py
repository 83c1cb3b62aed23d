"""What a decode step's output loses with a set of pages: the plain torch form.

For one query head, with w_B = exp(page_lse_B) and mean value v_B of page B, and a learned sink of weight s and value 0,

    output without the set = sum_{B kept} w_B v_B / (sum_{B kept} w_B + s)

which is exact: no second pass over keys or values is needed to know it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvpress_kernels.pages import n_pages


def joint_change(
    page_lse: Tensor,
    page_values: Tensor,
    output_wide: Tensor,
    lse: Tensor,
    lengths: Tensor,
    page_size: int,
    removed: Tensor,
    *,
    sinks: Tensor | None = None,
) -> Tensor:
    """|output without the pages `removed` - output|, [R, G], from what `ragged_decode` returns with "values".

    page_lse: [R, M, G], page_values: [R, M, G, Dv], output_wide: [R, G, Dv], lse: [R, G], lengths: [R], removed:
    [R, M] bool; what it says beyond a row's pages is ignored. sinks: [Hkv * G], the learned sinks of that decode step.
    Pages that are all that a query sees change nothing by definition.
    """
    rows, columns, group = page_lse.shape
    used = torch.arange(columns, device=page_lse.device) < n_pages(lengths, page_size)[:, None]  # [R, M]
    kept = (used & ~removed)[:, :, None]
    kept_lse = torch.where(kept, page_lse, -math.inf)
    sink_lse = lse.new_full((rows, 1, group), -math.inf)
    if sinks is not None:
        sink_lse = sinks.to(lse.dtype).view(1, -1, 1, group).expand(rows * group // sinks.numel(), -1, -1, -1)
        sink_lse = sink_lse.reshape(rows, 1, group)
    rest_lse = torch.cat([kept_lse, sink_lse], 1).logsumexp(1, keepdim=True)  # [R, 1, G]
    lost = torch.where((used & removed)[:, :, None], torch.exp(page_lse - lse[:, None]), 0.0)  # [R, M, G]
    lost_mass = lost.sum(1, keepdim=True)  # [R, 1, G]
    # A sum over what is kept, relative to itself, or over what is removed: neither loses digits where it is used.
    most_is_lost = lost_mass > 0.5
    share = torch.where(kept, torch.exp(page_lse - rest_lse), 0.0)
    share = torch.where(most_is_lost, share, -lost / (1 - lost_mass))
    sink_share = torch.where(most_is_lost, torch.exp(sink_lse - rest_lse), 0.0)[:, 0, :, None]  # [R, G, 1]
    away = page_values.to(lse.dtype) - output_wide[:, None]
    away = torch.where(used[:, :, None, None], away, 0.0)  # [R, M, G, Dv]
    moved = (share[..., None] * away).sum(1) - sink_share * output_wide
    return torch.where(rest_lse[:, 0] > -math.inf, moved.norm(dim=-1), 0.0)
