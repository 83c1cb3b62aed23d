"""Attention of several new tokens per sequence over a ragged KV store, in plain torch.

For the second turn, assisted decoding and chunked prefill after an eviction: queries at known positions look
at stored tokens of which some may lie in their future. Segment by segment, in chunks of queries, so that the
scores never take more than SCORE_BYTES.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress_kernels.reference import cpu_route
from kvpress_kernels.reference.int8 import dequantise
from kvpress_kernels.reference.packed_decode import check_segments
from kvpress_kernels.reference.packed_units import softmax_dtype

# Scores and their softmax exist at the same time, so half of it each.
SCORE_BYTES = 64 << 20


@torch.no_grad()
def packed_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    starts: Sequence[int],
    lengths: Sequence[int],
    query_positions: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """`softmax(scale * q k^T) v` over the stored tokens of each segment that a query may see; no gradient.

    query: [B, Hkv, G, Q, D]. keys: [capacity, D], values: [capacity, Dv], any float dtype. positions:
    [capacity] int32, the original position of each stored token, ascending inside a segment. starts, lengths:
    B*Hkv host integers in (row, KV head) order. query_positions: [Q] int64, in any order, the same for all
    rows: a stored token is seen by a query when its position is not larger. softcap, sinks, key_scales, value_scales: as in
    `packed_decode`.

    Returns [B, Hkv, G, Q, Dv] in the dtype of query; a query that sees no token gives zeros. The softmax is
    float32, or float64 for a float64 query. Besides the result it takes SCORE_BYTES and one segment's K and V.
    Raises ValueError for shapes or segments that do not fit together.
    """
    batch, n_kv, group, n_queries, head_dim = query.shape
    check_segments(n_kv * group, batch * n_kv, head_dim, keys, values, starts, lengths, sinks)
    if positions.shape != keys.shape[:1] or query_positions.shape != (n_queries,):
        raise ValueError(
            f"expected one position per stored token ({keys.shape[0]}) and per query ({n_queries}); "
            f"got {tuple(positions.shape)} and {tuple(query_positions.shape)}"
        )
    work = cpu_route.matmul_dtype(query.dtype, query.device)
    out = query.new_zeros((batch * n_kv, group, n_queries, values.shape[1]))
    q_rgqd = query.reshape(batch * n_kv, group, n_queries, head_dim)
    sinks_hg = None if sinks is None else sinks.to(softmax_dtype(work)).view(n_kv, group)
    seen_from, seen_to = query_positions.min(), query_positions.max()
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        held = positions[start : start + length].long()
        # Stored in ascending order: nothing after `end` is seen by any query, all before `free` by every one.
        end = int(torch.searchsorted(held, seen_to, right=True)) if length else 0
        if end == 0:
            continue
        free = int(torch.searchsorted(held, seen_from, right=True))
        seen = slice(start, start + end)
        k_nd, v_nd = _read(keys, key_scales, seen, work), _read(values, value_scales, seen, work)
        sink_g = None if sinks_hg is None else sinks_hg[row % n_kv]
        step = max(1, SCORE_BYTES // (2 * group * (end + 1) * softmax_dtype(work).itemsize))
        for q0 in range(0, n_queries, step):
            q_gqd = q_rgqd[row, :, q0 : q0 + step].to(work)
            hidden = held[free:end] > query_positions[q0 : q0 + step, None] if free < end else None
            out[row, :, q0 : q0 + step] = _attend(q_gqd, k_nd, v_nd, hidden, scale, softcap, sink_g)
    return out.view(batch, n_kv, group, n_queries, values.shape[1])


def _read(vectors: Tensor, scales: Tensor | None, seen: slice, work: torch.dtype) -> Tensor:
    """Stored vectors [n, d] in `work` dtype."""
    return vectors[seen].to(work) if scales is None else dequantise(vectors[seen], scales[seen], work)


def _attend(
    q_gqd: Tensor,
    k_nd: Tensor,
    v_nd: Tensor,
    hidden_qm: Tensor | None,
    scale: float,
    softcap: float | None,
    sink_g: Tensor | None,
) -> Tensor:
    """[G, Q, Dv] of one segment; `hidden_qm` masks the last m tokens, None when every query sees all of them."""
    group, n_queries, head_dim = q_gqd.shape
    work, n_tokens = k_nd.dtype, k_nd.shape[0]
    # The power of two goes into the query: it is exact, and keeps float16 logits from overflowing.
    mantissa, exponent = math.frexp(scale)
    flat = (q_gqd * 2.0**exponent).reshape(group * n_queries, head_dim)
    logits = torch.mm(flat, k_nd.t()).to(softmax_dtype(work)).mul_(mantissa)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    logits = logits.view(group, n_queries, n_tokens)
    if hidden_qm is not None:
        logits[:, :, n_tokens - hidden_qm.shape[1] :].masked_fill_(hidden_qm, -math.inf)
    top = logits.amax(dim=-1, keepdim=True)
    if sink_g is not None:
        top = torch.maximum(top, sink_g[:, None, None])
    top.masked_fill_(top == -math.inf, 0.0)  # a query that sees nothing: every weight exp(-inf - 0) is zero
    probs = logits.sub_(top).exp_()
    total = probs.sum(dim=-1, keepdim=True)
    if sink_g is not None:
        total += torch.exp(sink_g[:, None, None] - top)
    out = torch.mm(probs.to(work).view(group * n_queries, n_tokens), v_nd).to(total.dtype)
    total.masked_fill_(total == 0, 1.0)
    return out.view(group, n_queries, -1).div_(total)
