"""Attention mass that every token receives from all queries of a prompt, the statistic of H2O (arXiv 2306.14048).

mass_i = sum_u A_ui        debiased: divided by the number of queries that see token i, since early ones are seen
                           by more (0 where none does)
"""

from __future__ import annotations

import torch
from torch import Tensor

#: elements of the largest intermediate (64 MiB in float32)
CHUNK_ELEMENTS = 1 << 24


def cumulative_mass(
    query: Tensor,
    keys: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    debias: bool = False,
) -> Tensor:
    """Column sums of causal attention, per query head.

    Args:
        query: [S, G, Q, D] queries of S KV heads with G query heads each; keys: [S, N, D].
        query_positions: [Q] in any order, key_positions: [N] ascending; a token is visible when its position <= the
            query's. A query that sees nothing adds nothing.
        scale: factor of the logits; softcap: logits become softcap * tanh(logits / softcap).
        sinks: [S, G] logits that join the denominator.
        debias: divide by the number of queries that see the token.

    Returns:
        [S, G, N] float32 (float64 for float64 input).
    """
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    n_heads, group, n_queries, _ = query.shape
    n_tokens = keys.shape[1]
    mass = keys.new_zeros(n_heads, group, n_tokens, dtype=dtype)
    viewers = keys.new_zeros(n_tokens, dtype=dtype)
    wide_keys = keys.to(dtype)[:, None].transpose(2, 3)  # [S, 1, D, N]
    step = max(1, CHUNK_ELEMENTS // max(1, n_heads * group * n_tokens))
    for start in range(0, n_queries, step):
        chunk = slice(start, start + step)
        logits = query[:, :, chunk].to(dtype) @ wide_keys * scale  # [S, G, q, N]
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        seen = key_positions <= query_positions[chunk, None]  # [q, N]
        logits = logits.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            column = sinks.to(dtype)[:, :, None, None].expand(-1, -1, logits.shape[2], 1)
            logits = torch.cat([logits, column], 3)
        probs = torch.softmax(logits, 3)[..., :n_tokens]
        mass += torch.where(seen, probs, 0.0).sum(2)  # a row of -inf is NaN
        viewers += seen.sum(0)
    return mass / viewers.clamp(min=1) if debias else mass
