"""How tokens enter pages: where a page's parts lie, and the one function through which kernels write keys and values.

What a page stores of a token, numbers or codes and scales, is decided in `store_tile` alone; the kernels that call it know
rows, tokens and slots, but not how numbers are kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress_kernels.int8 import quantise
from kvpress_kernels.launch import DTYPES, padded
from kvpress_kernels.pages import PageLayout, Pages

#: torch dtype -> Triton's name of a pointer to it
POINTER_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int8: "*i8"}
#: layouts whose configurations are compiled ahead of time: every head dim in bf16, and some of all else
SHIPPED_LAYOUTS = (
    *(PageLayout(32, dim, dim, torch.bfloat16) for dim in (64, 80, 96, 128, 192, 256)),
    PageLayout(32, 192, 128, torch.bfloat16),
    *(PageLayout(32, 128, 128, dtype) for dtype in (torch.float16, torch.float32)),
    *(PageLayout(size, dim, dim, torch.bfloat16) for size in (16, 64) for dim in (64, 128)),
)
#: the same for codes, which the kernels that read them take with queries in bf16
INT8_LAYOUTS = tuple(PageLayout(32, dim, dim, torch.int8) for dim in (128, 256))
INT8_LLAMA = INT8_LAYOUTS[0]
#: arguments of the kernels that store dense keys and values
STRIDES = frozenset(f"{part}_{axis}_stride" for part in ("key", "value") for axis in ("batch", "head", "token"))


@triton.jit
def page_at(ANCHOR, entry):
    """Pointer to the first element of the pages with these entries, of any shape."""
    return ANCHOR + entry * (128 // ANCHOR.dtype.element_ty.primitive_bitwidth)  # elements per 16 bytes


@triton.jit
def words_of(page, OFFSET):
    """Pointer to a part of one 32-bit word a token (positions, scales) of the pages that start at `page`, of any shape."""
    return (page + OFFSET).to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def load_tile(first, token, token_stride, wanted, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Rows `token` [T] of a dense matrix that starts at `first`: [T, PADDED], zero where not `wanted` [T]."""
    column = tl.arange(0, PADDED)
    rows = first + token.to(tl.int64) * token_stride
    return tl.load(rows[:, None] + column[None, :], mask=wanted[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def store_tile(
    page, slot, tile, wanted,
    OFFSET, DIM, PADDED: tl.constexpr, SCALE_OFFSET, SIDE: tl.constexpr,
):  # fmt: skip
    """Write the keys or values of T tokens, tile [T, PADDED], into pages where `wanted` [T].

    page: first element of the one page, or [T] of each token's page; slot: [T] place of each token in its page;
    OFFSET: elements between the start of a page and its keys or values. SCALE_OFFSET: the same for its scales, None where
    numbers are stored as they are; SIDE: 0 for keys, 1 for values.
    """
    column = tl.arange(0, PADDED)
    if SCALE_OFFSET is not None:
        tile, scale = quantise(tile)
        first_scale = (page + SCALE_OFFSET).to(tl.pointer_type(tl.float16), bitcast=True)
        tl.store(first_scale + (2 * slot + SIDE), scale, mask=wanted)
    rows = page + (OFFSET + slot * DIM)
    mask = wanted[:, None] & (column < DIM)[None, :]
    tl.store(rows[:, None] + column[None, :], tile.to(page.dtype.element_ty), mask=mask)


def page_constants(layout: PageLayout) -> dict[str, int | None]:
    """Constexpr arguments that describe a page; offsets are in elements of its dtype. SCALE_OFFSET is None without scales."""
    return {
        "PAGE": layout.page_size,
        "DK": layout.key_dim,
        "DV": layout.value_dim,
        "DK_PADDED": padded(layout.key_dim),
        "DV_PADDED": padded(layout.value_dim),
        "VALUE_OFFSET": layout.value_offset // layout.dtype.itemsize,
        "SCALE_OFFSET": layout.scale_offset if layout.is_int8 else None,
        "POSITION_OFFSET": layout.position_offset // layout.dtype.itemsize,
    }


def new_token_types(dtype: torch.dtype) -> dict[str, str]:
    """Triton's types of dense keys and values, and of what says where they are."""
    numbers = dict.fromkeys(("KEYS", "VALUES"), POINTER_TYPES[dtype])
    return numbers | dict.fromkeys(("n_kv_heads", "table_stride", *sorted(STRIDES)), "i32")


def query_dtype(layout: PageLayout) -> torch.dtype:
    """The dtype of queries and new tokens that a layout is compiled for: its own, and bfloat16 for codes."""
    return torch.bfloat16 if layout.is_int8 else layout.dtype


def layout_label(layout: PageLayout, dtype: torch.dtype | None = None) -> str:
    """ "D128 P32 bf16", as configurations are named; "D128 P32 bf16 int8" for codes read with queries of a dtype."""
    dims = f"{layout.key_dim}" if layout.key_dim == layout.value_dim else f"{layout.key_dim}/{layout.value_dim}"
    number = POINTER_TYPES[dtype or query_dtype(layout)].removeprefix("*")
    return f"D{dims} P{layout.page_size} {number}{' int8' * layout.is_int8}"


def check_pages(pages: Pages, page_table: Tensor, lengths: Tensor | None, rows: int | None = None) -> None:
    """Raise ValueError unless kernels can find the pages of `rows` rows (of any number when None)."""
    size = pages.layout.page_size
    if pages.layout.dtype not in (*DTYPES, torch.int8):
        raise ValueError(f"pages hold {pages.layout.dtype}; kernels read bfloat16, float16, float32 and int8")
    if size & (size - 1):
        raise ValueError(f"kernels need a page size that is a power of two, got {size}")
    if page_table.dim() != 2 or page_table.dtype != torch.int64 or not page_table.is_contiguous():
        raise ValueError(
            f"page_table must be a contiguous [rows, pages] int64 tensor, got {page_table.dtype} {tuple(page_table.shape)}"
        )
    rows = page_table.shape[0] if rows is None else rows
    if page_table.shape[0] != rows:
        raise ValueError(f"page_table has {page_table.shape[0]} rows for {rows} pairs of sequence and KV head")
    if lengths is None:
        return
    if lengths.shape != (rows,) or lengths.dtype != torch.int32 or not lengths.is_contiguous():
        raise ValueError(f"lengths must be [{rows}] int32 and contiguous, got {lengths.dtype} {tuple(lengths.shape)}")


def check_new_tokens(keys: Tensor, values: Tensor, layout: PageLayout) -> None:
    """Raise ValueError unless dense keys [B, Hkv, n, Dk] and values [B, Hkv, n, Dv] can be stored in such pages."""
    for name, tensor, dim in (("keys", keys, layout.key_dim), ("values", values, layout.value_dim)):
        if tensor.dim() != 4 or tensor.shape[3] != dim or tensor.shape[:3] != keys.shape[:3]:
            raise ValueError(
                f"expected keys [B, Hkv, n, {layout.key_dim}] and values [B, Hkv, n, {layout.value_dim}]; "
                f"got {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} are {tensor.dtype}; kernels read bfloat16, float16 and float32")
        if tensor.numel() and tensor.stride(3) != 1:
            raise ValueError(f"the last dimension of {name} must be contiguous, its stride is {tensor.stride(3)}")


def check_ragged(items: Tensor, offsets: Tensor, rows: int, name: str) -> None:
    """Raise ValueError unless items [total] and offsets [rows + 1] are contiguous int32 lists, one list a row."""
    if items.dim() != 1 or items.dtype != torch.int32 or not items.is_contiguous():
        raise ValueError(f"{name} must be one contiguous int32 list, got {items.dtype} {tuple(items.shape)}")
    if offsets.shape != (rows + 1,) or offsets.dtype != torch.int32 or not offsets.is_contiguous():
        raise ValueError(f"offsets must be [{rows + 1}] int32, got {offsets.dtype} {tuple(offsets.shape)}")
