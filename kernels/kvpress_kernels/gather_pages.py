"""Store the kept tokens of a dense prefill into pages: one read and one write of what is kept."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvpress_kernels.launch import CompileCase, check_device
from kvpress_kernels.page_store import (
    INT8_LLAMA,
    POINTER_TYPES,
    SHIPPED_LAYOUTS,
    STRIDES,
    check_new_tokens,
    check_pages,
    check_ragged,
    layout_label,
    load_tile,
    new_token_types,
    page_at,
    page_constants,
    query_dtype,
    store_tile,
    words_of,
)
from kvpress_kernels.pages import PageLayout, Pages


@triton.jit
def _gather_pages(
    KEYS, VALUES, COLUMNS, OFFSETS, ANCHOR, PAGE_TABLE,
    n_kv_heads, table_stride,
    key_batch_stride, key_head_stride, key_token_stride,
    value_batch_stride, value_head_stride, value_token_stride,
    PAGE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
    VALUE_OFFSET: tl.constexpr, SCALE_OFFSET: tl.constexpr, POSITION_OFFSET: tl.constexpr,
):  # fmt: skip
    # One program a page. Pages come first in the grid: its second axis ends at 65,535.
    page_index = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    first, end = tl.load(OFFSETS + row), tl.load(OFFSETS + row + 1)
    if page_index * PAGE >= end - first:
        return
    batch, head = row // n_kv_heads, row % n_kv_heads
    page = page_at(ANCHOR, tl.load(PAGE_TABLE + row * table_stride + page_index))
    slot = tl.arange(0, PAGE)
    kept = page_index * PAGE + slot < end - first
    column = tl.load(COLUMNS + first + page_index * PAGE + slot, mask=kept, other=0)

    first_key = KEYS + batch * key_batch_stride + head * key_head_stride
    keys = load_tile(first_key, column, key_token_stride, kept, DK, DK_PADDED)
    store_tile(page, slot, keys, kept, 0, DK, DK_PADDED, SCALE_OFFSET, 0)
    first_value = VALUES + batch * value_batch_stride + head * value_head_stride
    values = load_tile(first_value, column, value_token_stride, kept, DV, DV_PADDED)
    store_tile(page, slot, values, kept, VALUE_OFFSET, DV, DV_PADDED, SCALE_OFFSET, 1)
    tl.store(words_of(page, POSITION_OFFSET) + slot, column, mask=kept)


def gather_pages(
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    offsets: Tensor,
    pages: Pages,
    page_table: Tensor,
    *,
    max_kept: int,
) -> None:
    """Fill each row's pages with the tokens `columns[offsets[r] : offsets[r + 1]]` of its sequence, in this order.

    keys: [B, Hkv, n, Dk], values: [B, Hkv, n, Dv], any strides, but the last dimension contiguous. columns: [total]
    int32 indices below n, which become the positions. offsets: [R + 1] int32 ascending, where R = B * Hkv in
    (sequence, KV head) order. page_table: [R, M] int64, naming ceil(kept / P) pages of each row. max_kept: an upper
    bound of the tokens that a row keeps, from which the grid is made.

    Lengths are the caller's. Never waits for the device. Raises ValueError for tensors that do not fit together.
    """
    check_new_tokens(keys, values, pages.layout)
    batch, n_kv_heads = keys.shape[:2]
    check_pages(pages, page_table, None, batch * n_kv_heads)
    check_ragged(columns, offsets, batch * n_kv_heads, "columns")
    check_device(keys, values, columns, offsets, pages.anchor, page_table)
    n_pages = triton.cdiv(max_kept, pages.layout.page_size)
    if n_pages > page_table.shape[1]:
        raise ValueError(f"{max_kept} tokens a row do not fit into the {page_table.shape[1]} pages of the page table")
    if n_pages == 0 or columns.numel() == 0 or page_table.shape[0] == 0:
        return
    _gather_pages[(n_pages, batch * n_kv_heads)](
        keys, values, columns, offsets, pages.anchor, page_table,
        n_kv_heads, page_table.stride(0), *keys.stride()[:3], *values.stride()[:3],
        **page_constants(pages.layout),
        num_warps=_num_warps(pages.layout),
    )  # fmt: skip


def _num_warps(layout: PageLayout) -> int:
    """Enough threads that each holds at most 64 bytes of keys; the same for all devices, since nothing but copies happens."""
    nbytes = layout.page_size * max(layout.key_dim, layout.value_dim) * layout.dtype.itemsize
    return 4 if nbytes <= 8192 else 8


def compile_cases(arch: str) -> list[CompileCase]:
    """The configurations that are shipped for an architecture."""
    cases = []
    for layout in (*SHIPPED_LAYOUTS, INT8_LLAMA):
        types = new_token_types(query_dtype(layout)) | {"ANCHOR": POINTER_TYPES[layout.dtype]}
        types |= {"COLUMNS": "*i32", "OFFSETS": "*i32", "PAGE_TABLE": "*i64"}
        label, num_warps, constants = layout_label(layout), _num_warps(layout), page_constants(layout)
        cases.append(CompileCase("gather_pages", label, _gather_pages, types, constants, num_warps, 1, STRIDES))
    return cases
