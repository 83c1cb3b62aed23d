"""Store new tokens in a reduced space whose ranks differ from head to head: projected and appended in one launch.

A program takes some new tokens of one row, multiplies their keys and values with the head's bases in float32, and stores the
products behind the row's last token, as numbers or as codes. Tiles have the width of the largest rank; a page's place of
values and scales follows from the row's ranks, which the kernel reads, as in `lowrank_decode`. Nothing of the products is
written elsewhere, and they are rounded once.

Formulas: `kvpress_kernels.reference.project_append`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress_kernels.append import add_new, check_columns, count, counted, place
from kvpress_kernels.launch import CompileCase, check_device, check_dtype, padded
from kvpress_kernels.lowrank_launch import CODE_RANK_STEP, RANK_STEP, check_reduced, rank_step
from kvpress_kernels.page_store import POINTER_TYPES, STRIDES, new_token_types, store_tile, words_of
from kvpress_kernels.pages import Pages

#: tokens of a program: the least that `tl.dot` takes; and dimensions that are multiplied at a time
BLOCK, BLOCK_IN = 16, 32
NUM_WARPS, NUM_STAGES = 4, 2


@triton.jit
def _reduced(
    first, token, token_stride, stored, basis, DIM: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Keys or values `token` [T] of the dense matrix at `first` times the basis [DIM, RANK]: [T, RANK_PADDED] float32."""
    lane = tl.arange(0, RANK_PADDED)
    result = tl.zeros([token.shape[0], RANK_PADDED], tl.float32)
    for start in range(0, DIM, BLOCK_IN):
        inner = start + tl.arange(0, BLOCK_IN)
        at = token.to(tl.int64)[:, None] * token_stride + inner[None, :]
        vectors = tl.load(first + at, mask=stored[:, None] & (inner < DIM)[None, :], other=0.0).to(tl.float32)
        basis_at = inner[:, None] * RANK + lane[None, :]
        columns = tl.load(basis + basis_at, mask=(inner < DIM)[:, None] & (lane < RANK)[None, :], other=0.0)
        result = tl.dot(vectors, columns, result, input_precision="ieee")
    return result


@triton.jit(do_not_specialize=["n_tokens", "table_stride"])
def _project_append(
    KEYS, VALUES, COLUMNS, VALID, VALID_COUNT, ANCHOR, PAGE_TABLE, LENGTHS, RANKS, KEY_BASES, VALUE_BASES,
    n_tokens, n_kv_heads, table_stride,
    key_batch_stride, key_head_stride, key_token_stride,
    value_batch_stride, value_head_stride, value_token_stride,
    PAGE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    RK: tl.constexpr, RV: tl.constexpr,  # the largest ranks
    RK_PADDED: tl.constexpr, RV_PADDED: tl.constexpr,
    RANK_STEP: tl.constexpr,  # all ranks are multiples of it
    CODES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_IN: tl.constexpr, HAS_VALID: tl.constexpr, COUNT_HERE: tl.constexpr,
):  # fmt: skip
    # The long axis of the grid comes first: the second one ends at 65,535.
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // n_kv_heads, row % n_kv_heads
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    stored, page, slot, length = place(
        VALID, VALID_COUNT, ANCHOR, PAGE_TABLE, LENGTHS, row, batch, token, n_tokens, table_stride, PAGE, HAS_VALID
    )
    # The division and the product change nothing: they tell the compiler what each token starts at a multiple of.
    key_rank = tl.load(RANKS + head * 2) // RANK_STEP * RANK_STEP
    value_rank = tl.load(RANKS + head * 2 + 1) // RANK_STEP * RANK_STEP
    # P >= 16 tokens of a multiple of 8 numbers: each part starts right behind the one before, at a multiple of 16 bytes
    first_value, end = PAGE * key_rank, PAGE * (key_rank + value_rank)
    scales, positions = None, end
    if CODES:
        scales, positions = end, end + PAGE * 4

    first_key = KEYS + batch * key_batch_stride + head * key_head_stride
    keys = _reduced(
        first_key, token, key_token_stride, stored, KEY_BASES + head * (DK * RK), DK, RK, RK_PADDED, BLOCK_IN
    )
    store_tile(page, slot, keys, stored, 0, key_rank, RK_PADDED, scales, 0)
    first = VALUES + batch * value_batch_stride + head * value_head_stride
    values = _reduced(
        first, token, value_token_stride, stored, VALUE_BASES + head * (DV * RV), DV, RV, RV_PADDED, BLOCK_IN
    )
    store_tile(page, slot, values, stored, first_value, value_rank, RV_PADDED, scales, 1)
    column = tl.load(COLUMNS + token, mask=stored, other=0).to(tl.int32)
    tl.store(words_of(page, positions) + slot, column, mask=stored)
    if COUNT_HERE:
        count(LENGTHS, row, length, stored)


def project_append(
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    pages: Sequence[Pages],
    page_table: Tensor,
    lengths: Tensor,
    ranks: Tensor,
    key_bases: Tensor,
    value_bases: Tensor,
    *,
    valid: Tensor | None = None,
) -> None:
    """Write K U_h and V W_h of the valid new tokens to the end of each row, and add their number to `lengths` in place.

    keys: [B, H, q, D], values: [B, H, q, Dv]; any strides, but the last dimension contiguous. columns: [q] int32 or int64
    positions. pages: for every pair of ranks of a head, the pages of `PageLayout(P, rK, rV, dtype)`, all with one anchor.
    page_table: [R, M] int64, where R = B * H in (sequence, KV head) order; it already names the pages that the new tokens
    need, which is not checked. lengths: [R] int32 stored tokens. ranks: [H, 2] int32, rK and rV of each head, multiples of
    8. key_bases: [H, D, RK], value_bases: [H, Dv, RV], float32. valid: [B, q] bool, False for padding, which is not stored.

    Computed in float32 and rounded once. Never waits for the device. Raises ValueError for tensors that do not fit together.
    """
    _check(keys, values, columns, pages, page_table, lengths, ranks, key_bases, value_bases, valid)
    batch, n_kv_heads, n_tokens, _ = keys.shape
    if not keys.numel():
        return
    layout = pages[0].layout
    valid, valid_count = counted(valid)
    one_program_a_row = n_tokens <= BLOCK
    _project_append[(triton.cdiv(n_tokens, BLOCK), batch * n_kv_heads)](
        keys, values, columns.contiguous(), valid, valid_count, pages[0].anchor, page_table, lengths,
        ranks, key_bases.contiguous(), value_bases.contiguous(),
        n_tokens, n_kv_heads, page_table.stride(0), *keys.stride()[:3], *values.stride()[:3],
        **_constants(layout.page_size, key_bases.shape[1:], value_bases.shape[1:], rank_step(pages), layout.is_int8),
        HAS_VALID=valid is not None, COUNT_HERE=one_program_a_row, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    if not one_program_a_row:
        add_new(lengths, n_kv_heads, n_tokens, valid_count)


def _check(
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    pages: Sequence[Pages],
    page_table: Tensor,
    lengths: Tensor,
    ranks: Tensor,
    key_bases: Tensor,
    value_bases: Tensor,
    valid: Tensor | None,
) -> None:
    """Raise ValueError, in one sentence, where the operands do not fit together."""
    if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            f"expected keys [B, H, n, D] and values [B, H, n, Dv], got {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    batch, n_kv_heads, n_tokens, _ = keys.shape
    for name, tensor in (("keys", keys), ("values", values)):
        check_dtype(tensor, name)
        if tensor.numel() and tensor.stride(3) != 1:
            raise ValueError(f"the last dimension of {name} must be contiguous, its stride is {tensor.stride(3)}")
    dims = keys.shape[3], values.shape[3]
    check_reduced(pages, page_table, lengths, ranks, key_bases, value_bases, batch, n_kv_heads, dims)
    check_device(
        keys, values, columns, pages[0].anchor, page_table, lengths, ranks, key_bases, value_bases, valid
    )  # fmt: skip
    check_columns(columns, valid, batch, n_tokens)


def _constants(page_size: int, keys: Sequence[int], values: Sequence[int], step: int, codes: bool) -> dict[str, int]:
    """Constexpr arguments. keys, values: full dimension and largest rank of each side; step: what all ranks are multiples of."""
    return {
        "PAGE": page_size,
        "DK": keys[0], "RK": keys[1], "RK_PADDED": padded(keys[1]),
        "DV": values[0], "RV": values[1], "RV_PADDED": padded(values[1]),
        "RANK_STEP": step, "CODES": codes, "BLOCK": BLOCK, "BLOCK_IN": BLOCK_IN,
    }  # fmt: skip


def compile_cases(arch: str) -> list[CompileCase]:
    """Head dimensions 64, 128 and 256, numbers and codes, one token and a chunk with padding."""
    return [
        _case(128, 96, torch.bfloat16, chunk=False),
        _case(128, 96, torch.int8, chunk=False),
        _case(64, 64, torch.bfloat16, chunk=True),
        _case(256, 192, torch.int8, chunk=True),
    ]


def _case(dim: int, rank: int, stored: torch.dtype, *, chunk: bool) -> CompileCase:
    codes = stored == torch.int8
    constants: dict[str, int | None] = {
        **_constants(32, (dim, rank), (dim, rank), CODE_RANK_STEP if codes else RANK_STEP, codes)
    }
    constants |= {"HAS_VALID": chunk, "COUNT_HERE": not chunk}
    types = new_token_types(torch.bfloat16) | {"ANCHOR": POINTER_TYPES[stored], "LENGTHS": "*i32", "RANKS": "*i32"}
    types |= {"COLUMNS": "*i64", "PAGE_TABLE": "*i64", "n_tokens": "i32", "KEY_BASES": "*fp32", "VALUE_BASES": "*fp32"}
    if chunk:
        types |= {"VALID": "*i8", "VALID_COUNT": "*i32"}
    else:
        constants |= {"VALID": None, "VALID_COUNT": None}
    label = f"D{dim} R{rank} P32 bf16{' int8' * codes}{' chunk valid' if chunk else ' decode'}"
    return CompileCase("project_append", label, _project_append, types, constants, NUM_WARPS, NUM_STAGES, STRIDES)
