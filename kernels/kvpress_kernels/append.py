"""Store new tokens behind those that each row already holds: one launch, no copy and no wait for the device."""

from __future__ import annotations

import torch
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
def place(
    VALID, VALID_COUNT, ANCHOR, PAGE_TABLE, LENGTHS, row, batch, token, n_tokens, table_stride,
    PAGE: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Where new tokens [T] of a row go: whether each is stored, its page and slot, and how many the row holds before."""
    stored = token < n_tokens
    rank = token  # place of a token among the valid ones
    if HAS_VALID:
        valid_at = batch * n_tokens + token
        rank = tl.load(VALID_COUNT + valid_at, mask=stored, other=1) - 1
        stored &= tl.load(VALID + valid_at, mask=stored, other=0) != 0
    length = tl.load(LENGTHS + row)
    slot = length + rank
    entry = tl.load(PAGE_TABLE + row * table_stride + slot // PAGE, mask=stored, other=0)
    return stored, page_at(ANCHOR, entry), slot % PAGE, length


@triton.jit
def count(LENGTHS, row, length, stored):
    """Add the tokens that the row's only program has stored to its length."""
    tl.debug_barrier()  # every warp has read the length before one of them changes it
    tl.store(LENGTHS + row, length + tl.sum(stored.to(tl.int32)))


@triton.jit(do_not_specialize=["n_tokens", "table_stride"])
def _append(
    KEYS, VALUES, COLUMNS, VALID, VALID_COUNT, ANCHOR, PAGE_TABLE, LENGTHS,
    n_tokens, n_kv_heads, table_stride,
    key_batch_stride, key_head_stride, key_token_stride,
    value_batch_stride, value_head_stride, value_token_stride,
    PAGE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
    VALUE_OFFSET: tl.constexpr, SCALE_OFFSET: tl.constexpr, POSITION_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr, HAS_VALID: tl.constexpr, COUNT_HERE: tl.constexpr,
):  # fmt: skip
    # The long axis of the grid comes first: the second one ends at 65,535.
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // n_kv_heads, row % n_kv_heads
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    stored, page, slot, length = place(
        VALID, VALID_COUNT, ANCHOR, PAGE_TABLE, LENGTHS, row, batch, token, n_tokens, table_stride, PAGE, HAS_VALID
    )

    first_key = KEYS + batch * key_batch_stride + head * key_head_stride
    keys = load_tile(first_key, token, key_token_stride, stored, DK, DK_PADDED)
    store_tile(page, slot, keys, stored, 0, DK, DK_PADDED, SCALE_OFFSET, 0)
    first_value = VALUES + batch * value_batch_stride + head * value_head_stride
    values = load_tile(first_value, token, value_token_stride, stored, DV, DV_PADDED)
    store_tile(page, slot, values, stored, VALUE_OFFSET, DV, DV_PADDED, SCALE_OFFSET, 1)
    column = tl.load(COLUMNS + token, mask=stored, other=0).to(tl.int32)
    tl.store(words_of(page, POSITION_OFFSET) + slot, column, mask=stored)
    if COUNT_HERE:
        count(LENGTHS, row, length, stored)


def append(
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    pages: Pages,
    page_table: Tensor,
    lengths: Tensor,
    *,
    valid: Tensor | None = None,
) -> None:
    """Write the valid tokens of each sequence to the end of its rows, and add their number to `lengths` in place.

    keys: [B, Hkv, q, Dk], values: [B, Hkv, q, Dv]; any strides, so views of [B, q, Hkv, D] are not copied, but the
    last dimension is contiguous. columns: [q] int32 or int64 positions, the same for all sequences. page_table: [R, M]
    int64, where R = B * Hkv in (sequence, KV head) order; it already names the pages that the new tokens need, which
    is not checked. lengths: [R] int32 stored tokens. valid: [B, q] bool, False for padding, which is not stored and
    takes no slot; None: all tokens are valid.

    Never waits for the device, and may be captured in a graph. Raises ValueError for tensors that do not fit together.
    """
    check_new_tokens(keys, values, pages.layout)
    batch, n_kv_heads, n_tokens, _ = keys.shape
    check_pages(pages, page_table, lengths, batch * n_kv_heads)
    check_device(keys, values, columns, pages.anchor, page_table, lengths, valid)
    check_columns(columns, valid, batch, n_tokens)
    if keys.numel() == 0 and values.numel() == 0:
        return
    valid, valid_count = counted(valid)
    block, num_warps = _launch(n_tokens)
    one_program_a_row = n_tokens == 1
    _append[(triton.cdiv(n_tokens, block), batch * n_kv_heads)](
        keys, values, columns.contiguous(), valid, valid_count, pages.anchor, page_table, lengths,
        n_tokens, n_kv_heads, page_table.stride(0), *keys.stride()[:3], *values.stride()[:3],
        **page_constants(pages.layout),
        BLOCK=block, HAS_VALID=valid is not None, COUNT_HERE=one_program_a_row, num_warps=num_warps,
    )  # fmt: skip
    if not one_program_a_row:
        add_new(lengths, n_kv_heads, n_tokens, valid_count)


def check_columns(columns: Tensor, valid: Tensor | None, batch: int, n_tokens: int) -> None:
    """Raise ValueError unless these say where new tokens are from, and which of them are real."""
    if columns.shape != (n_tokens,) or columns.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"columns must be [{n_tokens}] int32 or int64, got {columns.dtype} {tuple(columns.shape)}")
    if valid is not None and (valid.shape != (batch, n_tokens) or valid.dtype != torch.bool):
        raise ValueError(f"valid must be [{batch}, {n_tokens}] bool, got {valid.dtype} {tuple(valid.shape)}")


def counted(valid: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask as int8, and for each token how many are valid up to it."""
    if valid is None:
        return None, None
    valid = valid.contiguous()
    return valid.view(torch.int8), valid.cumsum(1, dtype=torch.int32)


def add_new(lengths: Tensor, n_kv_heads: int, n_tokens: int, valid_count: Tensor | None) -> None:
    """Add the stored tokens to the lengths of their rows, where several programs have stored those of one row."""
    if valid_count is None:
        lengths += n_tokens
    else:
        lengths.view(-1, n_kv_heads).add_(valid_count[:, -1:])


def _launch(n_tokens: int) -> tuple[int, int]:
    """Tokens a program, and warps; the same for all devices, since nothing but copies happens."""
    return (1, 1) if n_tokens == 1 else (16, 4)


def compile_cases(arch: str) -> list[CompileCase]:
    """The configurations that are shipped for an architecture."""
    cases = []
    for layout in (*SHIPPED_LAYOUTS, INT8_LLAMA):
        common = layout in (PageLayout(32, dim, dim, torch.bfloat16) for dim in (64, 128))
        for n_tokens, has_valid in ((1, False), (1, True), (2, False), (2, True)):
            if not common and (n_tokens, has_valid) not in ((1, True), (2, True) if layout.page_size == 32 else ()):
                continue  # without a mask the kernel is the same less two loads
            block, num_warps = _launch(n_tokens)
            types = new_token_types(query_dtype(layout)) | {"ANCHOR": POINTER_TYPES[layout.dtype], "LENGTHS": "*i32"}
            types |= {"COLUMNS": "*i64", "PAGE_TABLE": "*i64", "n_tokens": "i32"}
            constants: dict[str, object] = {"BLOCK": block, "HAS_VALID": has_valid, "COUNT_HERE": n_tokens == 1}
            if has_valid:
                types |= {"VALID": "*i8", "VALID_COUNT": "*i32"}
            else:
                constants |= {"VALID": None, "VALID_COUNT": None}
            label = f"{layout_label(layout)} {'decode' if n_tokens == 1 else 'chunk'}{' valid' if has_valid else ''}"
            constants |= page_constants(layout)
            cases.append(CompileCase("append", label, _append, types, constants, num_warps, 1, STRIDES))
    return cases
