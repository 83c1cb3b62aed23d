"""Attention of one new token per sequence over pages, in one pass that can also say what each page contributed.

A program reads some consecutive pages of one row for all query heads of its group, one page a step, and leaves a
partial result that `split_reduce` joins. Rows are divided in one of two ways:

    plain       every row into the same number of splits, from shapes alone
    balanced    into items of equally many pages, from a `WorkList`, for rows of very different lengths

Formulas, and what is returned: `kvpress_kernels.reference.ragged_decode`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress_kernels import decode_launch
from kvpress_kernels.int8 import scaled, scales_of
from kvpress_kernels.launch import LOG2E, CompileCase, architecture, check_device, check_dtype, n_processors
from kvpress_kernels.page_store import check_pages, page_at, words_of
from kvpress_kernels.pages import Pages
from kvpress_kernels.reference.ragged_decode import Decoded, Statistics
from kvpress_kernels.reference.work_list import WorkList
from kvpress_kernels.softcap import tanh
from kvpress_kernels.split_reduce import split_reduce


# a wider table must not compile anew in the middle of decoding; no load width depends on these
@triton.jit(do_not_specialize=["n_columns", "share"])
def _decode_pages(
    QUERY,  # [R, G, DK]
    ANCHOR,  # what entries count from
    PAGE_TABLE,  # [R, M] entries
    LENGTHS,  # [R]
    ITEM_ROW,  # [I], balanced grid only
    ITEM_FIRST_PAGE,  # [I], balanced grid only
    PARTIAL_OUTPUT,  # [I, G, DV]
    PARTIAL_MAX,  # [I, G]
    PARTIAL_SUM,  # [I, G]
    PAGE_LSE,  # [R, M, G]
    PAGE_VALUES,  # [R, M, G, DV]
    logit_factor,  # of the logits, or of tanh under a softcap: gives powers of two
    cap_factor,  # scale / softcap
    n_columns,  # M
    share,  # splits of a row; pages of an item in the balanced grid
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,  # of a group that this program serves
    DK: tl.constexpr,
    DK_PADDED: tl.constexpr,
    DV: tl.constexpr,
    DV_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,  # None where pages hold numbers and no codes
    STATISTICS: tl.constexpr,  # 0: none, 1: page_lse, 2: page_values too
    BY_PAGE: tl.constexpr,  # each page has an output of its own: for statistics, and for weights in a unit of its own
    SOFTCAP: tl.constexpr,
    BALANCED: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    if BALANCED:
        item = tl.program_id(0).to(tl.int64)
        row = tl.load(ITEM_ROW + item).to(tl.int64)
        n_heads = tl.where(row >= 0, GROUP, 0)  # the list ends in items of no row, which write nothing
        n_tokens = tl.load(LENGTHS + row, mask=row >= 0, other=0)
        first = tl.load(ITEM_FIRST_PAGE + item)
        last = tl.minimum(first + share, tl.cdiv(n_tokens, PAGE))
    else:
        row = tl.program_id(0).to(tl.int64)
        item = row * share + tl.program_id(1)
        n_heads = GROUP
        n_tokens = tl.load(LENGTHS + row)
        n_pages = tl.cdiv(n_tokens, PAGE)
        split_pages = tl.cdiv(n_pages, share)
        first = tl.program_id(1) * split_pages
        last = tl.minimum(first + split_pages, n_pages)

    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    key_dim = tl.arange(0, DK_PADDED)
    value_dim = tl.arange(0, DV_PADDED)
    token = tl.arange(0, PAGE)
    is_head = head < n_heads
    is_key = key_dim < DK
    is_value = value_dim < DV
    is_output = is_head[:, None] & is_value[None, :]
    output_at = head[:, None] * DV + value_dim[None, :]

    query_at = row * (GROUP * DK) + head[:, None] * DK + key_dim[None, :]
    query = tl.load(QUERY + query_at, mask=is_head[:, None] & is_key[None, :], other=0.0)  # [G, DK]
    if UPCAST:
        query = query.to(tl.float32)

    largest = tl.full([HEADS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    output = tl.zeros([HEADS, DV_PADDED], tl.float32)

    # The entry of the next page is carried along: read in the same step, it would cost the pipeline two stages.
    row_table = PAGE_TABLE + row * n_columns
    next_entry = tl.load(row_table + first, mask=first < last, other=0)
    for p in tl.range(first, last, 1, num_stages=STAGES):
        page = page_at(ANCHOR, next_entry)
        next_entry = tl.load(row_table + p + 1, mask=p + 1 < last, other=0)
        stored = p * PAGE + token < n_tokens
        key_at = token[None, :] * DK + key_dim[:, None]
        keys = tl.load(page + key_at, mask=stored[None, :] & is_key[:, None], other=0)  # [DK, P]
        value_at = VALUE_OFFSET + token[:, None] * DV + value_dim[None, :]
        values = tl.load(page + value_at, mask=stored[:, None] & is_value[None, :], other=0)  # [P, DV]
        if SCALE_OFFSET is not None:
            word = tl.load(words_of(page, SCALE_OFFSET) + token, mask=stored, other=0)
            key_scale, value_scale = scales_of(word)
        # widened in the interpreter; codes are exact in every float dtype
        keys = keys.to(query.dtype)
        values = values.to(query.dtype)

        logits = tl.dot(query, keys, input_precision="ieee")  # [G, P]
        if SCALE_OFFSET is not None:
            logits *= key_scale[None, :]
        if SOFTCAP:
            logits = tanh(logits * cap_factor)
        logits = tl.where(stored[None, :], logits, -float("inf"))
        page_largest = tl.max(logits, 1) * logit_factor
        new_largest = tl.maximum(largest, page_largest)
        rescale = tl.exp2(largest - new_largest)
        largest = new_largest
        # With statistics, weights are relative to the page itself: they must not vanish beside a far heavier page.
        base = page_largest if BY_PAGE else new_largest
        # The multiply-add rounds once and next to zero, so that large logits keep their differences.
        weights = tl.exp2(tl.fma(logits, tl.full(logits.shape, logit_factor, tl.float32), -base[:, None]))
        page_total = tl.sum(weights, 1)
        unit = 1.0
        if SCALE_OFFSET is not None:
            weights, unit = scaled(weights, value_scale, BY_PAGE)
        if not BY_PAGE:
            total = total * rescale + page_total
            output = tl.dot(weights.to(values.dtype), values, output * rescale[:, None], input_precision="ieee")
        else:
            page_share = tl.exp2(page_largest - largest)
            page_output = tl.dot(weights.to(values.dtype), values, input_precision="ieee") * unit  # [G, DV]
            total = total * rescale + page_total * page_share
            output = output * rescale[:, None] + page_output * page_share[:, None]
            if STATISTICS > 0:
                page_lse = (page_largest + tl.log2(page_total)) * 0.6931471805599453
                statistic_at = (row * n_columns + p) * GROUP
                tl.store(PAGE_LSE + statistic_at + head, page_lse, mask=is_head)
            if STATISTICS == 2:
                page_values = (page_output / page_total[:, None]).to(PAGE_VALUES.dtype.element_ty)
                tl.store(PAGE_VALUES + statistic_at * DV + output_at, page_values, mask=is_output)

    # An item without pages leaves a maximum of -inf, at which the reduction does not read its output.
    tl.store(PARTIAL_MAX + item * GROUP + head, largest, mask=is_head)
    tl.store(PARTIAL_SUM + item * GROUP + head, total, mask=is_head)
    if first < last:
        tl.store(PARTIAL_OUTPUT + item * (GROUP * DV) + output_at, output, mask=is_output)


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
    """`softmax(scale * q k^T) v` over each row's pages; inference only, no gradient, no wait for the device.

    Args:
        query: [B, Hkv, G, Dk] in the pages' dtype, or in any for int8 pages, one token per sequence; row r = b * Hkv + h.
        pages: where the tokens are. page_table: [R, M] int64 entries of `pages`, contiguous. lengths: [R] int32 stored
            tokens, 0 to M * P; nothing at or beyond a row's length is read.
        scale: positive factor of the logits. softcap: logits become softcap * tanh(logits / softcap).
        sinks: [Hkv * G] logits that join the denominator with value 0.
        statistics: "lse" adds page_lse, "values" adds page_values too, at the cost of writing them.
        work: divides the rows into items, for rows of very different lengths. Made from these lengths, or from longer
            ones; pages that its items do not cover would be missed.

    Returns:
        `Decoded`, wide results in float32; an empty row gives zeros.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit together.
    """
    layout = pages.layout
    _check(query, pages, page_table, lengths, scale, softcap, sinks, statistics, work)
    batch, n_kv_heads, group, _ = query.shape
    rows, columns = page_table.shape
    launch = decode_launch.launch_options(architecture(query.device), layout, group)
    head_tiles = -(-group // launch.heads)
    first_item: Tensor | int
    if work is None:
        share = first_item = decode_launch.n_splits(rows * head_tiles, columns, n_processors(query.device))
        items, grid = rows * share, (rows, share, head_tiles)
    else:
        items, share, first_item = work.row.numel(), work.chunk_pages, work.first_item
        grid = (items, 1, head_tiles)

    partial_output = query.new_empty((items, group, layout.value_dim), dtype=torch.float32)
    partial_max = query.new_empty((items, group), dtype=torch.float32)
    partial_sum = torch.empty_like(partial_max)
    page_lse = page_values = None
    if statistics != "none":
        page_lse = query.new_empty((rows, columns, group), dtype=torch.float32)
    if statistics == "values":
        page_values = query.new_empty((rows, columns, group, layout.value_dim))
    constants = decode_launch.constants(
        layout,
        group,
        statistics,
        launch,
        softcap=softcap is not None,
        balanced=work is not None,
        upcast=decode_launch.upcast(layout, query.dtype),
        dtype=query.dtype,
    )
    if items:
        _decode_pages[grid](
            query.contiguous(),
            pages.anchor,
            page_table,
            lengths,
            None if work is None else work.row,
            None if work is None else work.first_page,
            partial_output,
            partial_max,
            partial_sum,
            page_lse,
            page_values,
            (scale if softcap is None else softcap) * LOG2E,
            0.0 if softcap is None else scale / softcap,
            columns,
            share,
            **constants,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    reduced = split_reduce(
        partial_output,
        partial_max,
        partial_sum,
        first_item,
        group_sinks=sinks,
        n_kv_heads=n_kv_heads,
        dtype=query.dtype,
    )
    output = reduced.output.view(batch, n_kv_heads, group, layout.value_dim)
    return Decoded(output, reduced.output_wide, reduced.lse, page_lse, page_values)


def _check(
    query: Tensor,
    pages: Pages,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    statistics: str,
    work: WorkList | None,
) -> None:
    """Raise ValueError, in one sentence, where the operands do not fit together."""
    layout = pages.layout
    if query.dim() != 4 or query.shape[3] != layout.key_dim:
        raise ValueError(f"query must be [B, Hkv, G, {layout.key_dim}] for these pages, got {tuple(query.shape)}")
    batch, n_kv_heads, group, _ = query.shape
    check_pages(pages, page_table, lengths, batch * n_kv_heads)
    if layout.page_size < 16:
        raise ValueError(f"kernels need pages of at least 16 tokens to attend, got {layout.page_size}")
    check_dtype(query, "query")
    if query.dtype != layout.dtype and not layout.is_int8:
        raise ValueError(f"query is {query.dtype}, but the pages hold {layout.dtype}")
    check_device(query, pages.anchor, page_table, lengths, sinks, *(() if work is None else work[:3]))
    if scale <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"scale and softcap must be positive, got {scale} and {softcap}")
    if statistics not in ("none", "lse", "values"):
        raise ValueError(f"statistics must be 'none', 'lse' or 'values', got '{statistics}'")
    if sinks is not None and sinks.numel() != n_kv_heads * group:
        raise ValueError(f"sinks must hold {n_kv_heads * group} logits, one per query head, got {sinks.numel()}")
    if work is not None and work.first_item.numel() != batch * n_kv_heads + 1:
        raise ValueError(f"the work list is for {work.first_item.numel() - 1} rows, not {batch * n_kv_heads}")


def compile_cases(arch: str) -> list[CompileCase]:
    """The configurations that are compiled and inspected without a device."""
    return decode_launch.compile_cases(arch, _decode_pages)
