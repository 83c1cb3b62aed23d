"""Which pages a decode step's output depends on: share and output change of every page, from their statistics alone.

With m_B = exp(page_lse_B - lse) the share of page B, v_B its mean value and o the output,

    |o without B - o| = m_B / (1 - m_B) |o - v_B|

A page with nearly all of the attention (as an attention sink is in) goes the other way, over all other pages: both
1 - m_B and o - v_B would be nothing but rounding, of page_values in half precision above all. Reference:
`kvpress_kernels.reference.leave_one_out`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress_kernels.joint_change import NUM_WARPS, case, change_without, check_statistics, constants, load_sink
from kvpress_kernels.launch import CompileCase
from kvpress_kernels.reference.leave_one_out import LeaveOneOut
from kvpress_kernels.reference.window_scores import DOMINANT


@triton.jit
def _page_changes(
    PAGE_LSE,  # [R, M, G]
    PAGE_VALUES,  # [R, M, G, DV]
    OUTPUT,  # [R, G, DV]
    LSE,  # [R, G]
    LENGTHS,  # [R]
    MASS,  # [R, M, G]
    CHANGE,  # [R, M, G]
    n_columns,  # M
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    DV_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some (page, head) pairs of one row: pairs lie in a row, so their mean values are one tile."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    head = pair % GROUP
    value_dim = tl.arange(0, DV_PADDED)
    is_value = value_dim < DV
    used = pair < tl.cdiv(tl.load(LENGTHS + row), PAGE) * GROUP
    first = row * n_columns * GROUP

    page_lse = tl.load(PAGE_LSE + first + pair, mask=used, other=-float("inf"))
    lse = tl.load(LSE + row * GROUP + head, mask=used, other=0.0)
    mass = tl.exp(page_lse - lse)
    value_at = (first + pair)[:, None] * DV + value_dim[None, :]
    values = tl.load(PAGE_VALUES + value_at, mask=used[:, None] & is_value[None, :], other=0.0).to(tl.float32)
    output_at = (row * GROUP + head)[:, None] * DV + value_dim[None, :]
    away = tl.load(OUTPUT + output_at, mask=used[:, None] & is_value[None, :], other=0.0) - values  # [pairs, DV]
    distance = tl.sqrt(tl.sum(away * away, 1))
    rest = tl.where(mass < 1, 1 - mass, 1.0)  # what is wrong about a heavy page is mended afterwards
    exists = pair < n_columns * GROUP
    tl.store(MASS + first + pair, mass, mask=exists)
    tl.store(CHANGE + first + pair, mass / rest * distance, mask=exists)


@triton.jit
def _heavy_page_changes(
    PAGE_LSE,  # [R, M, G]
    PAGE_VALUES,  # [R, M, G, DV]
    OUTPUT,  # [R, G, DV]
    LSE,  # [R, G]
    LENGTHS,  # [R]
    SINKS,  # [Hkv * G], or None
    CHANGE,  # [R, M, G]
    n_columns,  # M
    n_kv_heads,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    DV_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
    DOMINANT: tl.constexpr,
):
    """The one page of a row and head that may have nearly all of its attention."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    n_pages = tl.cdiv(tl.load(LENGTHS + row), PAGE)
    first = row * n_columns * GROUP + head
    lse = tl.load(LSE + row * GROUP + head)
    top = -float("inf")
    heaviest = 0
    for start in range(0, n_pages, SCAN):
        page = start + tl.arange(0, SCAN)
        page_lse = tl.load(PAGE_LSE + first + page * GROUP, mask=page < n_pages, other=-float("inf"))
        block_top, at = tl.max(page_lse, 0, return_indices=True)
        heaviest = tl.where(block_top > top, start + at, heaviest)
        top = tl.maximum(top, block_top)
    is_heavy = False
    if n_pages > 0:
        is_heavy = tl.exp(top - lse) > DOMINANT
    if is_heavy:
        value_dim = tl.arange(0, DV_PADDED)
        change = change_without(
            PAGE_LSE + first,
            PAGE_VALUES + first * DV,
            None,
            heaviest,
            tl.load(OUTPUT + (row * GROUP + head) * DV + value_dim, mask=value_dim < DV, other=0.0),
            lse,
            load_sink(SINKS, row, head, n_kv_heads, GROUP),
            n_pages,
            GROUP,
            DV,
            DV_PADDED,
            BLOCK,
            SCAN,
        )
        tl.store(CHANGE + first + heaviest * GROUP, change)


def leave_one_out(
    page_lse: Tensor,
    page_values: Tensor,
    output_wide: Tensor,
    lse: Tensor,
    lengths: Tensor,
    page_size: int,
    *,
    sinks: Tensor | None = None,
) -> LeaveOneOut:
    """Share of every page in the attention, and |output without the page - output|.

    Args:
        page_lse: [R, M, G] float32, page_values: [R, M, G, Dv], output_wide: [R, G, Dv] float32, lse: [R, G] float32,
            as `ragged_decode` returns them with statistics "values", for `lengths` [R] int32.
        page_size: tokens of a page.
        sinks: [Hkv * G] the learned sinks of that decode step; without them heavy pages would come out wrong.

    Returns:
        `LeaveOneOut`, both [R, M, G] float32 and 0 beyond a row's pages. A page that is all that a query sees (nothing
        else is left, neither a page nor a sink) changes nothing by definition.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit together.
    """
    rows, columns, group, value_dim = check_statistics(page_lse, page_values, output_wide, lse, lengths, sinks)
    mass, change = torch.empty_like(page_lse), torch.empty_like(page_lse)
    if not mass.numel():
        return LeaveOneOut(mass, change)
    shape = constants(page_size, group, value_dim)
    scan = shape.pop("SCAN")
    _page_changes[(rows, -(-columns * group // shape["BLOCK"]))](
        page_lse, page_values, output_wide, lse, lengths, mass, change, columns, **shape, num_warps=NUM_WARPS
    )
    _heavy_page_changes[(rows, group)](
        page_lse,
        page_values,
        output_wide,
        lse,
        lengths,
        None if sinks is None else sinks.contiguous(),
        change,
        columns,
        1 if sinks is None else sinks.numel() // group,
        **shape,
        SCAN=scan,
        DOMINANT=DOMINANT,
        num_warps=NUM_WARPS,
    )
    return LeaveOneOut(mass, change)


def compile_cases(arch: str) -> list[CompileCase]:
    """The configurations that are compiled and inspected without a device."""
    shipped = [(64, "bf16", False), (128, "bf16", True), (256, "bf16", False), (80, "fp32", True)]
    single = [case(_page_changes, value_dim, number, False) for value_dim, number, _ in shipped]
    return [*single, *(case(_heavy_page_changes, *which) for which in shipped)]
