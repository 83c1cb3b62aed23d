"""Attention of one new token per sequence over pages of a reduced space whose ranks differ from head to head.

One launch serves all KV heads of a layer: pages of all ranks count from one anchor, and where keys and values lie in a
page follows from the row's ranks, which the kernel reads. Tiles have the shape of the largest rank, loads are masked at
the row's own: a head of rank 16 reads 16 numbers of a token. Queries are projected before, once for each row and not once
for each program of it, and outputs brought back after the reduction (`lowrank_project`), both in float32.

A product with keys takes the query in their dtype. Bases are float32 because half precision keeps three digits of them,
and a query rounded once behind them would lose the same: it comes in two parts, itself and what that rounds off, and the
second product costs no byte of a page.

Formulas: `kvpress_kernels.reference.lowrank_decode`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress_kernels import decode_launch, lowrank_launch
from kvpress_kernels.int8 import scaled, scales_of
from kvpress_kernels.launch import INTERPRETED, LOG2E, CompileCase, architecture, n_processors
from kvpress_kernels.lowrank_project import project
from kvpress_kernels.page_store import page_at, words_of
from kvpress_kernels.pages import PageLayout, Pages
from kvpress_kernels.reference.work_list import WorkList
from kvpress_kernels.softcap import tanh
from kvpress_kernels.split_reduce import split_reduce


# a wider table must not compile anew in the middle of decoding; no load width depends on these
@triton.jit(do_not_specialize=["n_columns", "share"])
def _decode_reduced(
    QUERY,  # [R, G, RK] projected, in the pages' dtype, or over codes in the model's
    QUERY_REST,  # [R, G, RK], what that rounds off; None in float32
    ANCHOR,  # what entries count from
    PAGE_TABLE,  # [R, M] entries
    LENGTHS,  # [R]
    RANKS,  # [H, 2]
    ITEM_ROW,  # [I], balanced grid only
    ITEM_FIRST_PAGE,  # [I], balanced grid only
    PARTIAL_OUTPUT,  # [I, G, RV]
    PARTIAL_MAX,  # [I, G]
    PARTIAL_SUM,  # [I, G]
    logit_factor,  # of the logits, or of tanh under a softcap: gives powers of two
    cap_factor,  # scale / softcap
    n_columns,  # M
    share,  # splits of a row; pages of an item in the balanced grid
    n_kv_heads,  # H
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,  # of a group that this program serves
    RK: tl.constexpr,  # the largest ranks
    RK_PADDED: tl.constexpr,
    RV: tl.constexpr,
    RV_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    CODES: tl.constexpr,  # whether pages hold codes and scales
    RANK_STEP: tl.constexpr,  # all ranks are multiples of it
    IN_UNITS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BALANCED: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    if BALANCED:
        item = tl.program_id(0).to(tl.int64)
        listed = tl.load(ITEM_ROW + item).to(tl.int64)
        n_heads = tl.where(listed >= 0, GROUP, 0)  # the list ends in items of no row, which write nothing
        row = tl.maximum(listed, 0)
        n_tokens = tl.load(LENGTHS + row, mask=listed >= 0, other=0)
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

    # The division and the product change nothing: they tell the compiler what each token starts at a multiple of.
    rank_at = (row % n_kv_heads) * 2
    key_rank = tl.load(RANKS + rank_at) // RANK_STEP * RANK_STEP
    value_rank = tl.load(RANKS + rank_at + 1) // RANK_STEP * RANK_STEP

    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    key_lane = tl.arange(0, RK_PADDED)
    value_lane = tl.arange(0, RV_PADDED)
    token = tl.arange(0, PAGE)
    is_head = head < n_heads
    is_key = key_lane < key_rank
    is_value = value_lane < value_rank

    query_at = (row * GROUP + head)[:, None] * RK + key_lane[None, :]
    is_query = is_head[:, None] & is_key[None, :]
    query = tl.load(QUERY + query_at, mask=is_query, other=0.0)  # [G, RK]
    if UPCAST:
        query = query.to(tl.float32)
    if QUERY_REST is not None:
        rest = tl.load(QUERY_REST + query_at, mask=is_query, other=0.0)
        if UPCAST:
            rest = rest.to(tl.float32)

    largest = tl.full([HEADS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    output = tl.zeros([HEADS, RV_PADDED], tl.float32)

    # The entry of the next page is carried along: read in the same step, it would cost the pipeline two stages.
    row_table = PAGE_TABLE + row * n_columns
    next_entry = tl.load(row_table + first, mask=first < last, other=0)
    for p in tl.range(first, last, 1, num_stages=STAGES):
        page = page_at(ANCHOR, next_entry)
        next_entry = tl.load(row_table + p + 1, mask=p + 1 < last, other=0)
        stored = p * PAGE + token < n_tokens
        key_at = token[None, :] * key_rank + key_lane[:, None]
        keys = tl.load(page + key_at, mask=stored[None, :] & is_key[:, None], other=0)  # [RK, P]
        # P >= 16 rows of a multiple of 8 numbers: the values start right behind them, at a multiple of 16 bytes
        value_at = PAGE * key_rank + token[:, None] * value_rank + value_lane[None, :]
        values = tl.load(page + value_at, mask=stored[:, None] & is_value[None, :], other=0)  # [P, RV]
        if CODES:
            word = tl.load(words_of(page, PAGE * (key_rank + value_rank)) + token, mask=stored, other=0)
            key_scale, value_scale = scales_of(word)
        # widened in the interpreter; codes are exact in every float dtype
        keys = keys.to(query.dtype)
        values = values.to(query.dtype)

        logits = tl.dot(query, keys, input_precision="ieee")  # [G, P]
        if QUERY_REST is not None:
            logits = tl.dot(rest, keys, logits, input_precision="ieee")
        if CODES:
            logits *= key_scale[None, :]
        if SOFTCAP:
            logits = tanh(logits * cap_factor)
        logits = tl.where(stored[None, :], logits, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(logits, 1) * logit_factor)
        rescale = tl.exp2(largest - new_largest)
        largest = new_largest
        # The multiply-add rounds once and next to zero, so that large logits keep their differences.
        weights = tl.exp2(tl.fma(logits, tl.full(logits.shape, logit_factor, tl.float32), -largest[:, None]))
        total = total * rescale + tl.sum(weights, 1)
        if CODES:
            weights, unit = scaled(weights, value_scale, IN_UNITS)
        output *= rescale[:, None]
        if IN_UNITS:
            output += unit * tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        else:
            output = tl.dot(weights.to(values.dtype), values, output, input_precision="ieee")

    # An item without pages leaves a maximum of -inf, at which the reduction does not read its output.
    tl.store(PARTIAL_MAX + item * GROUP + head, largest, mask=is_head)
    tl.store(PARTIAL_SUM + item * GROUP + head, total, mask=is_head)
    if first < last:  # lanes from the row's rank on are zeros
        output_at = (item * GROUP + head)[:, None] * RV + value_lane[None, :]
        tl.store(PARTIAL_OUTPUT + output_at, output, mask=is_head[:, None] & (value_lane < RV)[None, :])


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
    """`softmax(scale * q U (K U)^T) (V W) W^T + lost` over each row's pages; inference only, no wait for the device.

    Args:
        query: [B, H, G, D], one token per sequence; row r = b * H + h.
        pages: for every pair of ranks of a head, the pages of `PageLayout(P, rK, rV, dtype)`, all with one anchor; of one
            float dtype, or all of int8.
        page_table: [R, M] int64 entries, contiguous. lengths: [R] int32 stored tokens, 0 to M * P; nothing at or beyond
            a row's length, and no number at or beyond its ranks, is read.
        ranks: [H, 2] int32, rK and rV of each head, multiples of 8 that are at least 8. They stay on the device, so
            nobody can check that a row's pages are of its ranks.
        key_bases: [H, D, RK], value_bases: [H, Dv, RV], float32; zero in the columns from a head's rank on.
        scale: positive factor of the logits. softcap: logits become softcap * tanh(logits / softcap).
        sinks: [H * G] logits that join the denominator with value 0.
        lost: [H, Dv], added to the output of every row of its head, of an empty one too.
        work: divides the rows into items, as for `ragged_decode`.

    Returns:
        [B, H, G, Dv] in the query's dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit together.
    """
    lowrank_launch.check(
        query, pages, page_table, lengths, ranks, key_bases, value_bases, scale, softcap, sinks, lost, work
    )
    batch, n_kv_heads, group, _ = query.shape
    rows, columns = page_table.shape
    key_rank, (_, value_dim, value_rank) = key_bases.shape[2], value_bases.shape
    largest = PageLayout(pages[0].layout.page_size, key_rank, value_rank, pages[0].layout.dtype)
    launch = lowrank_launch.launch_options(architecture(query.device), largest, group)
    head_tiles = -(-group // launch.heads)
    first_item: Tensor | int
    if work is None:
        share = first_item = decode_launch.n_splits(rows * head_tiles, columns, n_processors(query.device))
        items, grid = rows * share, (rows, share, head_tiles)
    else:
        items, share, first_item = work.row.numel(), work.chunk_pages, work.first_item
        grid = (items, 1, head_tiles)

    dtype = query.dtype if largest.is_int8 else largest.dtype
    reduced_query = query.new_empty((rows, group, key_rank), dtype=dtype)
    query_rest = None if dtype == torch.float32 else torch.empty_like(reduced_query)
    partial_output = query.new_empty((items, group, value_rank), dtype=torch.float32)
    partial_max = query.new_empty((items, group), dtype=torch.float32)
    partial_sum = torch.empty_like(partial_max)
    output = query.new_empty((batch, n_kv_heads, group, value_dim))
    project(query.contiguous().flatten(0, 1), key_bases.contiguous(), reduced_query, transposed=False, rest=query_rest)
    if items:
        _decode_reduced[grid](
            reduced_query,
            query_rest,
            pages[0].anchor,
            page_table,
            lengths,
            ranks,
            None if work is None else work.row,
            None if work is None else work.first_page,
            partial_output,
            partial_max,
            partial_sum,
            (scale if softcap is None else softcap) * LOG2E,
            0.0 if softcap is None else scale / softcap,
            columns,
            share,
            n_kv_heads,
            **lowrank_launch.constants(
                largest,
                group,
                launch,
                dtype=dtype,
                rank_step=lowrank_launch.rank_step(pages),
                softcap=softcap is not None,
                balanced=work is not None,
                # only bfloat16 is wrong in the interpreter: float16 takes the path of a device there
                upcast=INTERPRETED and dtype == torch.bfloat16,
            ),
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
        dtype=torch.float32,
    )
    project(
        reduced.output_wide,
        value_bases.contiguous(),
        output.flatten(0, 1),
        transposed=True,
        lost=None if lost is None else lost.contiguous(),
    )
    return output


def compile_cases(arch: str) -> list[CompileCase]:
    """The configurations that are compiled and inspected without a device."""
    return lowrank_launch.compile_cases(arch, _decode_reduced)
