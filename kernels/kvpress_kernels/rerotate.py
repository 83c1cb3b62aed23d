"""Turn stored keys back by a number of positions, in place in their pages: one read and one write of the keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress_kernels.launch import CompileCase, check_device, padded
from kvpress_kernels.page_store import POINTER_TYPES, SHIPPED_LAYOUTS, check_pages, layout_label, page_at
from kvpress_kernels.pages import PageLayout, Pages


@triton.jit
def _rerotate(
    ANCHOR, PAGE_TABLE, LENGTHS, SHIFTS, COS, SIN, table_stride,
    PAGE: tl.constexpr, DK: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr,
):  # fmt: skip
    # One program a page. Pages come first in the grid: its second axis ends at 65,535.
    page_index = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(LENGTHS + row)
    if page_index * PAGE >= length:
        return
    slot, pair = tl.arange(0, PAGE), tl.arange(0, HALF_PADDED)
    token = page_index * PAGE + slot
    shift = tl.load(SHIFTS + row * table_stride * PAGE + token, mask=token < length, other=0).to(tl.int64)
    # A token that stays where it is costs nothing, and is not rounded again.
    mask = (shift != 0)[:, None] & (pair < HALF)[None, :]
    angle = shift[:, None] * HALF + pair[None, :]
    cosine = tl.load(COS + angle, mask=mask, other=1.0)
    sine = tl.load(SIN + angle, mask=mask, other=0.0)

    page = page_at(ANCHOR, tl.load(PAGE_TABLE + row * table_stride + page_index))
    first = page + (slot[:, None] * DK + pair[None, :])
    x1 = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(first + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(first, (x1 * cosine + x2 * sine).to(ANCHOR.dtype.element_ty), mask=mask)
    tl.store(first + HALF, (x2 * cosine - x1 * sine).to(ANCHOR.dtype.element_ty), mask=mask)


def rerotate(pages: Pages, page_table: Tensor, lengths: Tensor, shifts: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate each stored key by R(-shift) in place, from its RoPE position p to p - shift.

    page_table: [R, M] int64. lengths: [R] int32. shifts: [R, M * P] int32, how far the token in each slot of a row
    moves, at least 0 and below n, which is not checked; read below the row's length only. cos, sin: [n, D] float32
    tables of the angles of 0 .. n - 1 positions, without any attention scaling. Dimension i < D of a key pairs with
    dimension i + D (half split, as in Llama); dimensions from 2 D on (partial rotary) are left alone, and so are stored
    positions. Formula: `kvpress_kernels.reference.rerotate`.

    Computed in float32. Never waits for the device. Raises ValueError for tensors that do not fit together, and for int8 pages.
    """
    layout = pages.layout
    if layout.is_int8:
        raise ValueError("keys in eight bits cannot be turned: each turn would round them again; store them in 16 bits")
    check_pages(pages, page_table, lengths)
    rows, n_pages = page_table.shape
    if shifts.shape != (rows, n_pages * layout.page_size) or shifts.dtype != torch.int32 or not shifts.is_contiguous():
        raise ValueError(
            f"shifts must be [{rows}, {n_pages * layout.page_size}] int32 and contiguous, "
            f"got {shifts.dtype} {tuple(shifts.shape)}"
        )
    for table in (cos, sin):
        if table.dim() != 2 or table.shape != cos.shape or table.dtype != torch.float32 or not table.is_contiguous():
            raise ValueError(
                f"cos and sin must be contiguous float32 tables of one shape [n, D], got {table.dtype} {tuple(table.shape)}"
            )
    if 2 * cos.shape[1] > layout.key_dim:
        raise ValueError(
            f"cos has {cos.shape[1]} angles a position; keys of {layout.key_dim} dimensions have half as many"
        )
    check_device(pages.anchor, page_table, lengths, shifts, cos, sin)
    if page_table.numel() == 0:
        return
    constants, num_warps = _configuration(layout, cos.shape[1])
    _rerotate[(n_pages, rows)](
        pages.anchor, page_table, lengths, shifts, cos, sin, page_table.stride(0), **constants, num_warps=num_warps
    )


def _configuration(layout: PageLayout, half: int) -> tuple[dict[str, int], int]:
    """Constexpr arguments and warps: 16 pairs of numbers a thread keep four tiles in registers."""
    constants = {"PAGE": layout.page_size, "DK": layout.key_dim, "HALF": half, "HALF_PADDED": padded(half)}
    return constants, 4 if layout.page_size * padded(half) <= 2048 else 8


def compile_cases(arch: str) -> list[CompileCase]:
    """The configurations that are shipped for an architecture."""
    partial = [(PageLayout(32, 128, 128, torch.bfloat16), 32), (PageLayout(32, 80, 80, torch.bfloat16), 16)]
    cases = []
    for layout, half in [*((layout, layout.key_dim // 2) for layout in SHIPPED_LAYOUTS), *partial]:
        constants, num_warps = _configuration(layout, half)
        types = {"ANCHOR": POINTER_TYPES[layout.dtype], "PAGE_TABLE": "*i64", "table_stride": "i32"}
        types |= {"LENGTHS": "*i32", "SHIFTS": "*i32", "COS": "*fp32", "SIN": "*fp32"}
        label = layout_label(layout) + ("" if 2 * half == layout.key_dim else f" rotary {2 * half}")
        cases.append(CompileCase("rerotate", label, _rerotate, types, constants, num_warps, 1))
    return cases
