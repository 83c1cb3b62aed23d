"""Store new tokens behind those that each row already holds: one launch, no copy and no wait for the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress_kernels.launch import CompileCase, check_device
from kvpress_kernels.page_store import (
    POINTER_TYPES,
    SHIPPED_LAYOUTS,
    check_new_tokens,
    check_pages,
    layout_label,
    load_tile,
    page_at,
    page_constants,
    store_tile,
    words_of,
)
from kvpress_kernels.pages import PageLayout, Pages


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
    stored = token < n_tokens
    rank = token  # place of a token among the valid ones
    if HAS_VALID:
        valid_at = batch * n_tokens + token
        rank = tl.load(VALID_COUNT + valid_at, mask=stored, other=1) - 1
        stored &= tl.load(VALID + valid_at, mask=stored, other=0) != 0
    length = tl.load(LENGTHS + row)
    slot = length + rank
    entry = tl.load(PAGE_TABLE + row * table_stride + slot // PAGE, mask=stored, other=0)
    page, slot = page_at(ANCHOR, entry), slot % PAGE

    first_key = KEYS + batch * key_batch_stride + head * key_head_stride
    keys = load_tile(first_key, token, key_token_stride, stored, DK, DK_PADDED)
    store_tile(page, slot, keys, stored, 0, DK, DK_PADDED, SCALE_OFFSET, 0)
    first_value = VALUES + batch * value_batch_stride + head * value_head_stride
    values = load_tile(first_value, token, value_token_stride, stored, DV, DV_PADDED)
    store_tile(page, slot, values, stored, VALUE_OFFSET, DV, DV_PADDED, SCALE_OFFSET, 1)
    column = tl.load(COLUMNS + token, mask=stored, other=0).to(tl.int32)
    tl.store(words_of(page, POSITION_OFFSET) + slot, column, mask=stored)
    if COUNT_HERE:
        tl.debug_barrier()  # every warp has read the length before one of them changes it
        tl.store(LENGTHS + row, length + tl.sum(stored.to(tl.int32)))


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
    if columns.shape != (n_tokens,) or columns.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"columns must be [{n_tokens}] int32 or int64, got {columns.dtype} {tuple(columns.shape)}")
    if valid is not None and (valid.shape != (batch, n_tokens) or valid.dtype != torch.bool):
        raise ValueError(f"valid must be [{batch}, {n_tokens}] bool, got {valid.dtype} {tuple(valid.shape)}")
    if keys.numel() == 0 and values.numel() == 0:
        return
    valid_count = None
    if valid is not None:
        valid = valid.contiguous()
        valid_count = valid.cumsum(1, dtype=torch.int32)
        valid = valid.view(torch.int8)
    block, num_warps = _launch(n_tokens)
    one_program_a_row = n_tokens == 1
    _append[(triton.cdiv(n_tokens, block), batch * n_kv_heads)](
        keys, values, columns.contiguous(), valid, valid_count, pages.anchor, page_table, lengths,
        n_tokens, n_kv_heads, page_table.stride(0), *keys.stride()[:3], *values.stride()[:3],
        **page_constants(pages.layout),
        BLOCK=block, HAS_VALID=valid is not None, COUNT_HERE=one_program_a_row, num_warps=num_warps,
    )  # fmt: skip
    if one_program_a_row:
        return
    if valid_count is None:
        lengths += n_tokens
    else:
        lengths.view(batch, n_kv_heads).add_(valid_count[:, -1:])


def _launch(n_tokens: int) -> tuple[int, int]:
    """Tokens a program, and warps; the same for all devices, since nothing but copies happens."""
    return (1, 1) if n_tokens == 1 else (16, 4)


def compile_cases(arch: str) -> list[CompileCase]:
    """The configurations that are shipped for an architecture."""
    strides = [f"{part}_{axis}_stride" for part in ("key", "value") for axis in ("batch", "head", "token")]
    cases = []
    for layout in SHIPPED_LAYOUTS:
        common = layout in (PageLayout(32, dim, dim, torch.bfloat16) for dim in (64, 128))
        for n_tokens, has_valid in ((1, False), (1, True), (2, False), (2, True)):
            if not common and (n_tokens, has_valid) not in ((1, True), (2, True) if layout.page_size == 32 else ()):
                continue  # without a mask the kernel is the same less two loads
            block, num_warps = _launch(n_tokens)
            types = dict.fromkeys(("KEYS", "VALUES", "ANCHOR"), POINTER_TYPES[layout.dtype])
            types |= {"COLUMNS": "*i64", "PAGE_TABLE": "*i64", "LENGTHS": "*i32"}
            types |= dict.fromkeys(("n_tokens", "n_kv_heads", "table_stride", *strides), "i32")
            constants: dict[str, object] = {"BLOCK": block, "HAS_VALID": has_valid, "COUNT_HERE": n_tokens == 1}
            if has_valid:
                types |= {"VALID": "*i8", "VALID_COUNT": "*i32"}
            else:
                constants |= {"VALID": None, "VALID_COUNT": None}
            label = f"{layout_label(layout)} {'decode' if n_tokens == 1 else 'chunk'}{' valid' if has_valid else ''}"
            constants |= page_constants(layout)
            cases.append(CompileCase("append", label, _append, types, constants, num_warps, 1, frozenset(strides)))
    return cases
