"""Attention of several new tokens per sequence over pages, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvpress_kernels.pages import Pages, n_pages


@torch.no_grad()
def ragged_attention(
    query: Tensor,
    pages: Pages,
    page_table: Tensor,
    lengths: Tensor,
    query_positions: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`softmax(scale * q k^T) v` over the stored tokens that each query may see; no gradient.

    query: [B, Hkv, G, Q, Dk], any float dtype. page_table: [R, M] int64, where R = B * Hkv in (sequence, KV head)
    order. lengths: [R] int32 stored tokens. query_positions: [Q] int64 in any order, the same for all sequences: a
    stored token is seen by a query when its position is not larger. softcap: logits become
    softcap * tanh(logits / softcap). sinks: [Hkv * G] learned logits that join the denominator with value 0.

    Returns [B, Hkv, G, Q, Dv] in the dtype of query, computed in float32, or in float64 for a float64 query; a query
    that sees no token gives zeros.
    """
    batch, n_kv, group, n_queries, _ = query.shape
    size, wide = pages.layout.page_size, torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_zeros(batch * n_kv, group, n_queries, pages.layout.value_dim)
    for row, length in enumerate(lengths.tolist()):
        held = pages.read(page_table[row, : n_pages(lengths[row], size)])
        keys, values, positions = (part.flatten(0, 1)[:length] for part in held)
        logits = query[row // n_kv, row % n_kv].to(wide) @ keys.to(wide).T * scale  # [G, Q, length]
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        hidden = positions > query_positions[:, None]  # [Q, length]
        logits = logits.masked_fill(hidden, -math.inf)
        sink = logits.new_full((group,), -math.inf) if sinks is None else sinks.to(wide).view(n_kv, group)[row % n_kv]
        logits = torch.cat([sink[:, None, None].expand(-1, n_queries, 1), logits], dim=2)
        # a query that sees nothing has no weights: 0, and not the NaN of an empty softmax
        probs = logits.softmax(dim=2).nan_to_num(0.0)[:, :, 1:]
        out[row] = probs @ values.to(wide)
    return out.view(*query.shape[:4], pages.layout.value_dim)
