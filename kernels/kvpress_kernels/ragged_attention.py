"""Attention of several new tokens per sequence over pages: second turns, drafts, chunked prefill after an eviction.

A program takes some consecutive tokens of one row for all query heads of its group, and goes over all pages of the
row, one a step, with an online softmax. A stored token is seen when its position, read from the page, is not larger
than the query's. Keys are not split over programs: there are enough tiles of queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress_kernels.decode_launch import CODE_BYTES, LEAST_SHARED_BYTES, SHARED_BYTES, in_units, upcast
from kvpress_kernels.int8 import scaled, scales_of
from kvpress_kernels.launch import LOG2E, CompileCase, architecture, check_device, check_dtype, padded
from kvpress_kernels.page_store import (
    INT8_LAYOUTS,
    INT8_LLAMA,
    POINTER_TYPES,
    SHIPPED_LAYOUTS,
    check_pages,
    layout_label,
    page_at,
    page_constants,
    query_dtype,
    words_of,
)
from kvpress_kernels.pages import PageLayout, Pages
from kvpress_kernels.softcap import tanh


@triton.jit(do_not_specialize=["n_queries"])
def _ragged_attention(
    QUERY, QUERY_POSITIONS, OUTPUT, SINKS, ANCHOR, PAGE_TABLE, LENGTHS,
    logit_factor,  # from what the softcap returns to powers of two
    cap_factor,  # scale / softcap
    n_queries, n_kv_heads, table_stride,
    query_batch_stride, query_head_stride, query_group_stride, query_token_stride,
    PAGE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
    VALUE_OFFSET: tl.constexpr, SCALE_OFFSET: tl.constexpr, POSITION_OFFSET: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr,
    HAS_SINKS: tl.constexpr, SOFTCAP: tl.constexpr, IN_UNITS: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    batch, kv_head = row // n_kv_heads, row % n_kv_heads
    # A line of the tile is one query: BLOCK tokens of the first head, then of the second, ...
    line = tl.arange(0, LINES)
    head, token = line // BLOCK, tl.program_id(0) * BLOCK + line % BLOCK
    real = (head < GROUP) & (token < n_queries)
    key_dim, value_dim, slot = tl.arange(0, DK_PADDED), tl.arange(0, DV_PADDED), tl.arange(0, PAGE)
    is_key, is_value = key_dim < DK, value_dim < DV

    line_at = head.to(tl.int64) * query_group_stride + token.to(tl.int64) * query_token_stride
    query_at = QUERY + batch * query_batch_stride + kv_head * query_head_stride + line_at
    query = tl.load(query_at[:, None] + key_dim[None, :], mask=real[:, None] & is_key[None, :], other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    query_position = tl.load(QUERY_POSITIONS + token, mask=real, other=-1).to(tl.int32)

    largest = tl.full([LINES], -float("inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    if HAS_SINKS:  # a logit that is there from the start, with value 0
        largest = tl.load(SINKS + kv_head * GROUP + head, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
        total += 1.0
    output = tl.zeros([LINES, DV_PADDED], tl.float32)

    length = tl.load(LENGTHS + row)
    n_pages = tl.cdiv(length, PAGE)
    row_table = PAGE_TABLE + row * table_stride
    # The entry of the next page is carried along: read in the same step, it would cost the pipeline two stages. So are
    # its positions, which the pipeline would otherwise copy to shared memory four bytes at a time. All of them are
    # read, stored or not: a mask a token would make this many narrow loads.
    next_entry = tl.load(row_table, mask=n_pages > 0, other=0)
    next_positions = words_of(page_at(ANCHOR, next_entry), POSITION_OFFSET) + slot
    all_slots = tl.full([PAGE], True, tl.int1)  # the interpreter takes no scalar mask for a tile
    next_position = tl.load(next_positions, mask=all_slots & (n_pages > 0), other=0)
    for page_index in tl.range(0, n_pages, 1, num_stages=STAGES):
        page = page_at(ANCHOR, next_entry)
        next_entry = tl.load(row_table + page_index + 1, mask=page_index + 1 < n_pages, other=0)
        stored = page_index * PAGE + slot < length
        key_at = slot[None, :] * DK + key_dim[:, None]
        keys = tl.load(page + key_at, mask=stored[None, :] & is_key[:, None], other=0)  # [DK, P]
        value_at = VALUE_OFFSET + slot[:, None] * DV + value_dim[None, :]
        values = tl.load(page + value_at, mask=stored[:, None] & is_value[None, :], other=0)  # [P, DV]
        if SCALE_OFFSET is not None:
            word = tl.load(words_of(page, SCALE_OFFSET) + slot, mask=stored, other=0)
            key_scale, value_scale = scales_of(word)
        position = next_position
        next_positions = words_of(page_at(ANCHOR, next_entry), POSITION_OFFSET) + slot
        next_position = tl.load(next_positions, mask=all_slots & (page_index + 1 < n_pages), other=0)
        # widened in the interpreter; codes are exact in every float dtype
        keys, values = keys.to(query.dtype), values.to(query.dtype)

        logits = tl.dot(query, keys, input_precision="ieee")  # [LINES, P]
        if SCALE_OFFSET is not None:
            logits *= key_scale[None, :]
        if SOFTCAP:
            logits = tanh(logits * cap_factor)
        seen = stored[None, :] & (position[None, :] <= query_position[:, None])
        logits = tl.where(seen, logits, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(logits, 1) * logit_factor)
        # A query that has seen nothing yet has a largest logit of -inf, from which nothing may be subtracted.
        subtracted = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        # The multiply-add rounds once and next to zero, so that large logits keep their differences.
        weights = tl.exp2(tl.fma(logits, tl.full(logits.shape, logit_factor, tl.float32), -subtracted[:, None]))
        rescale = tl.exp2(largest - subtracted)
        total = total * rescale + tl.sum(weights, 1)
        if SCALE_OFFSET is not None:
            weights, unit = scaled(weights, value_scale, IN_UNITS)
        output *= rescale[:, None]
        if IN_UNITS:
            output += unit * tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        else:
            output = tl.dot(weights.to(values.dtype), values, output, input_precision="ieee")
        largest = new_largest

    output = output / tl.where(total > 0, total, 1.0)[:, None]
    output_at = OUTPUT + ((row * GROUP + head) * n_queries + token) * DV
    output_mask = real[:, None] & is_value[None, :]
    tl.store(output_at[:, None] + value_dim[None, :], output.to(OUTPUT.dtype.element_ty), mask=output_mask)


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
    """`softmax(scale * q k^T) v` over the stored tokens that each query may see; inference only, no gradient.

    query: [B, Hkv, G, Q, Dk] in the pages' dtype, or in any for int8 pages; any strides, but the last dimension contiguous.
    page_table: [R, M] int64, where R = B * Hkv in (sequence, KV head) order. lengths: [R] int32 stored tokens; nothing at or
    beyond a row's length is read. query_positions: [Q] int64 in any order, the same for all sequences: a stored token is seen
    by a query when its position is not larger. softcap: logits become softcap * tanh(logits / softcap). sinks:
    [Hkv * G] learned logits that join the denominator with value 0.

    Returns [B, Hkv, G, Q, Dv] in the dtype of query; a query that sees no token gives zeros. Never waits for the
    device. Raises ValueError for tensors that do not fit together.
    """
    layout = pages.layout
    check_dtype(query, "query")
    other = query.dtype != layout.dtype and not layout.is_int8
    if query.dim() != 5 or query.shape[4] != layout.key_dim or other:
        raise ValueError(
            f"query must be [B, Hkv, G, Q, {layout.key_dim}] {layout.dtype}, got {query.dtype} {tuple(query.shape)}"
        )
    batch, n_kv_heads, group, n_queries, _ = query.shape
    if query.numel() and query.stride(4) != 1:
        raise ValueError(f"the last dimension of query must be contiguous, its stride is {query.stride(4)}")
    check_pages(pages, page_table, lengths, batch * n_kv_heads)
    if layout.page_size < 16:
        raise ValueError(f"matrix units need pages of at least 16 tokens, got {layout.page_size}")
    if query_positions.shape != (n_queries,) or query_positions.dtype != torch.int64:
        raise ValueError(
            f"query_positions must be [{n_queries}] int64, got {query_positions.dtype} {tuple(query_positions.shape)}"
        )
    if sinks is not None and sinks.shape != (n_kv_heads * group,):
        raise ValueError(f"sinks must be [{n_kv_heads * group}], one a query head, got {tuple(sinks.shape)}")
    if scale <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"scale and softcap must be positive, got {scale} and {softcap}")
    check_device(query, pages.anchor, page_table, lengths, query_positions, sinks)

    output = query.new_empty((batch, n_kv_heads, group, n_queries, layout.value_dim))
    if output.numel() == 0:
        return output
    launch = _launch(architecture(query.device), layout, query.dtype, group, n_queries)
    _ragged_attention[(triton.cdiv(n_queries, launch.block), batch * n_kv_heads)](
        query, query_positions.contiguous(), output, None if sinks is None else sinks.contiguous(),
        pages.anchor, page_table, lengths,
        (scale if softcap is None else softcap) * LOG2E, 0.0 if softcap is None else scale / softcap,
        n_queries, n_kv_heads, page_table.stride(0), *query.stride()[:4],
        **_constants(layout, query.dtype, group, sinks is not None, softcap is not None, launch),
        UPCAST=upcast(layout, query.dtype),
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return output


class _Launch(NamedTuple):
    """block: tokens of a tile; lines: queries of a tile, padded."""

    block: int
    lines: int
    num_warps: int
    num_stages: int


def _launch(arch: str, layout: PageLayout, dtype: torch.dtype, group: int, n_queries: int) -> _Launch:
    """Tiles as large as registers hold, since each reads all keys; warps that each load 16 bytes a lane; no spills."""
    amd, shared = arch.startswith("gfx"), SHARED_BYTES.get(arch, LEAST_SHARED_BYTES)
    size, item_bytes, full = layout.page_size, layout.dtype.itemsize, dtype == torch.float32
    wide = max(layout.key_dim, layout.value_dim) > 128
    if full:  # multiplied without matrix units
        most = 16 if wide or size == 64 else 32
    else:
        most = 64 if amd or wide or size == 16 else 128
        most >>= wide * (1 + layout.is_int8) + (size == 64) if amd else wide and shared < 160 << 10
    block = 1
    while 2 * block * group <= most and block < n_queries:
        block *= 2
    lines = padded(group * block)
    num_warps = 8 if lines > 64 or wide or full else 4
    tile_bytes = size * padded(min(layout.key_dim, layout.value_dim)) * item_bytes
    num_warps = max(1, min(num_warps, tile_bytes // (16 * (64 if amd else 32))))
    # One page less than stages is in shared memory; with asynchronous matrix units, which read from there, as many.
    # The queries are there too, and the weights where several warps share a line.
    page_bytes = size * (padded(layout.key_dim) + padded(layout.value_dim)) * item_bytes
    line_bytes = (padded(layout.key_dim) + (size if lines <= 64 else 0)) * dtype.itemsize
    pages = (shared - lines * line_bytes - (2 << 10)) // page_bytes
    stages = pages if arch == "sm_90" and lines >= 64 and not full else pages + 1
    return _Launch(block, lines, num_warps, max(1, min(stages, 2 if amd else 3)))


def _constants(
    layout: PageLayout, dtype: torch.dtype, group: int, has_sinks: bool, softcap: bool, launch: _Launch
) -> dict[str, int | bool | None]:
    tile = {"GROUP": group, "BLOCK": launch.block, "LINES": launch.lines, "STAGES": launch.num_stages}
    tile["IN_UNITS"] = in_units(layout, dtype)
    return {**page_constants(layout), **tile, "HAS_SINKS": has_sinks, "SOFTCAP": softcap}


def compile_cases(arch: str) -> list[CompileCase]:
    """The configurations that are shipped for an architecture."""
    llama = PageLayout(32, 128, 128, torch.bfloat16)
    gemma, wide = (PageLayout(32, 256, 256, dtype) for dtype in (torch.bfloat16, torch.float32))
    cases = [_case(arch, layout, 4, 512) for layout in (*SHIPPED_LAYOUTS, wide)]
    cases += [_case(arch, llama, 4, n_queries) for n_queries in (2, 8)]
    cases += [_case(arch, layout, 4, 512) for layout in INT8_LAYOUTS]
    cases += [_case(arch, INT8_LLAMA, 4, 2)]
    cases += [_case(arch, llama, 7, 512), _case(arch, llama, 8, 512, sinks=True, softcap=True)]
    return [*cases, _case(arch, gemma, 2, 512, softcap=True)]


def _case(
    arch: str,
    layout: PageLayout,
    group: int,
    n_queries: int,
    *,
    sinks: bool = False,
    softcap: bool = False,
    dtype: torch.dtype | None = None,
) -> CompileCase:
    dtype = dtype or query_dtype(layout)
    launch = _launch(arch, layout, dtype, group, n_queries)
    numbers = POINTER_TYPES[dtype]
    strides = [f"query_{axis}_stride" for axis in ("batch", "head", "group", "token")]
    types = {"QUERY": numbers, "QUERY_POSITIONS": "*i64", "OUTPUT": numbers}
    types |= {
        "ANCHOR": POINTER_TYPES[layout.dtype],
        "PAGE_TABLE": "*i64",
        "LENGTHS": "*i32",
        "logit_factor": "fp32",
        "cap_factor": "fp32",
    }
    types |= dict.fromkeys(("n_queries", "n_kv_heads", "table_stride", *strides), "i32")
    constants = {**_constants(layout, dtype, group, sinks, softcap, launch), "UPCAST": False}
    if sinks:
        types["SINKS"] = "*fp32"
    else:
        constants["SINKS"] = None
    words = [layout_label(layout, dtype), f"G{group}", f"tile {launch.lines}", "sinks" * sinks, "softcap" * softcap]
    label = " ".join(filter(None, words))
    return CompileCase(
        "ragged_attention", label, _ragged_attention, types, constants,
        launch.num_warps, launch.num_stages, frozenset(strides), kv_loop=True,
        load_bytes=CODE_BYTES if layout.is_int8 else 16,
    )  # fmt: skip
