"""Attention of one new token per sequence over pages, with what each page contributed: the plain torch form.

For one query head and page B of its row (e_i = exp(logit of token i)):

    page_lse_B = log sum_{i in B} e_i        page_values_B = sum_{i in B} e_i v_i / sum_{i in B} e_i
    output = sum_B exp(page_lse_B - lse) page_values_B, with lse over all pages and the learned sink

so a page's share of attention and the output without it follow from what is returned (`leave_one_out`).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvpress_kernels.pages import Pages, n_pages
from kvpress_kernels.reference.work_list import WorkList

Statistics = Literal["none", "lse", "values"]


class Decoded(NamedTuple):
    """What a decode step returns, for R = B * Hkv rows of G query heads over page tables of M columns.

    output: [B, Hkv, G, Dv] in the query's dtype. output_wide: [R, G, Dv], the same before rounding. lse: [R, G],
    natural log of the sum of exp(logit), learned sinks included; -inf where nothing was seen. page_lse: [R, M, G],
    the same for each page alone; page_values: [R, M, G, Dv] in the pages' dtype (the query's
    over codes), the attention-weighted mean value of each page. Entries of pages beyond a row's length are undefined.
    """

    output: Tensor
    output_wide: Tensor
    lse: Tensor
    page_lse: Tensor | None
    page_values: Tensor | None


def ragged_decode(
    query: Tensor,
    pages: Pages,
    page_table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    statistics: Statistics = "none",
    work: WorkList | None = None,
) -> Decoded:
    """`softmax(scale * q k^T) v` over each row's pages.

    Args:
        query: [B, Hkv, G, Dk], one token per sequence; row r = b * Hkv + h.
        pages: where the tokens are. page_table: [R, M] int64 entries of `pages`. lengths: [R] stored tokens, 0 to M * P;
            nothing at or beyond a row's length is read.
        scale: factor of the logits. softcap: logits become softcap * tanh(logits / softcap).
        sinks: [Hkv * G] logits that join the denominator with value 0.
        statistics: "lse" adds page_lse, "values" adds page_values too.
        work: how the kernel divides the rows; without effect here.

    Returns:
        `Decoded`; wide results are float32, or float64 for a float64 query. An empty row gives zeros.
    """
    batch, n_kv_heads, group, key_dim = query.shape
    (rows, columns), size = page_table.shape, pages.layout.page_size
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    used = torch.arange(columns, device=query.device) < n_pages(lengths, size)[:, None]  # [R, M]
    stored = torch.arange(columns * size, device=query.device) < lengths[:, None]  # [R, M * P]
    found = pages.read(page_table[used])
    keys, values = (
        torch.zeros((rows, columns, size, part.shape[-1]), dtype=wide, device=query.device)
        .masked_scatter_(used[:, :, None, None], part.to(wide))
        .flatten(1, 2)
        .masked_fill_(~stored[:, :, None], 0.0)
        for part in (found.keys, found.values)
    )
    logits = query.reshape(rows, group, key_dim).to(wide) @ keys.transpose(1, 2) * scale  # [R, G, M * P]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~stored[:, None], -math.inf)

    all_logits = logits
    if sinks is not None:
        all_logits = torch.cat([logits, sinks.to(wide).view(n_kv_heads, group, 1).repeat(batch, 1, 1)], -1)
    lse = all_logits.logsumexp(-1) if all_logits.shape[-1] else logits.new_full((rows, group), -math.inf)
    output = _weights(logits, lse[:, :, None]) @ values  # [R, G, Dv]

    page_lse = page_values = None
    if statistics != "none":
        by_page = logits.unflatten(-1, (columns, size)).transpose(1, 2)  # [R, M, G, P]
        page_lse = by_page.logsumexp(-1)
        if statistics == "values":
            weights = _weights(by_page, page_lse[..., None])
            page_values = (weights @ values.unflatten(1, (columns, size))).to(
                query.dtype if pages.layout.is_int8 else pages.layout.dtype
            )
    return Decoded(output.to(query.dtype).view(batch, n_kv_heads, group, -1), output, lse, page_lse, page_values)


def _weights(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse), zero where nothing was seen."""
    return torch.where(lse == -math.inf, 0.0, torch.exp(logits - lse))
