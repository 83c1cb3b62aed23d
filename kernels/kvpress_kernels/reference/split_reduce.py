"""Joins what the items of a row found: the plain torch form.

With the maximum m_i (in powers of two), the sum l_i and the unnormalised output o_i of item i, and the learned sink s:

    top = max_i m_i        output = sum_i 2^(m_i - top) o_i / (sum_i 2^(m_i - top) l_i + exp(s - top ln 2))
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Reduced(NamedTuple):
    """output: [R, G, Dv] in the dtype asked for; output_wide: the same before rounding; lse: [R, G], natural log."""

    output: Tensor
    output_wide: Tensor
    lse: Tensor


def split_reduce(
    partial_output: Tensor,
    partial_max: Tensor,
    partial_sum: Tensor,
    first_item: Tensor | int,
    *,
    group_sinks: Tensor | None = None,
    n_kv_heads: int,
    dtype: torch.dtype,
) -> Reduced:
    """Attention of each row from the partial results of its items.

    Args:
        partial_output: [I, G, Dv] sum of 2^(logit - max) v. partial_max: [I, G] in powers of two; -inf where an item
            found nothing, and its output is then not read. partial_sum: [I, G] sum of 2^(logit - max).
        first_item: [R + 1] int32; row r has the items first_item[r] to first_item[r + 1] - 1; items beyond
            first_item[R] are not read. An integer says that every row has that many.
        group_sinks: [Hkv * G] natural logits that join the denominator with value 0.
        n_kv_heads: row r belongs to KV head r % n_kv_heads.
        dtype: of the output.

    Returns:
        `Reduced`; a row that saw nothing gives zeros, and an lse of -inf unless there is a sink.
    """
    items, group, value_dim = partial_output.shape
    if isinstance(first_item, int):
        first_item = torch.arange(0, items + 1, first_item)
    bounds = first_item.tolist()
    outputs, lses = [], []
    for row, (first, last) in enumerate(pairwise(bounds)):
        logits = partial_max[first:last] * math.log(2) + partial_sum[first:last].log()  # [i, G], natural
        logits = torch.where(partial_max[first:last] == -math.inf, -math.inf, logits)
        means = partial_output[first:last] / partial_sum[first:last, :, None]
        means = torch.where(logits[:, :, None] == -math.inf, 0.0, means)
        if group_sinks is not None:
            sink = group_sinks.view(n_kv_heads, group)[row % n_kv_heads].to(logits.dtype)
            logits, means = torch.cat([logits, sink[None]]), torch.cat([means, means.new_zeros(1, group, value_dim)])
        lse = logits.logsumexp(0) if len(logits) else logits.new_full((group,), -math.inf)
        weights = torch.where(lse == -math.inf, 0.0, torch.exp(logits - lse))
        outputs.append((weights[:, :, None] * means).sum(0))
        lses.append(lse)
    wide = torch.stack(outputs)
    return Reduced(wide.to(dtype), wide, torch.stack(lses))
