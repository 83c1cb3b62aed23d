"""What a decode step's output loses with a set of pages, exactly, from the statistics of the pages alone.

With w_B = exp(page_lse_B) and mean value v_B of page B, a learned sink of weight s and value 0, and o the output,

    o without the set - o = sum_{B kept} w_B (v_B - o) / (sum_{B kept} w_B + s) - s o / (sum_{B kept} w_B + s)
                          = sum_{B removed} m_B (o - v_B) / (1 - sum_{B removed} m_B),        m_B = w_B / exp(lse)

The first form is used where most of the attention is removed, the second where less is: neither then subtracts nearly
equal numbers, and only the pages of one side are read. Reference: `kvpress_kernels.reference.joint_change`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress_kernels.launch import CompileCase, check_device, check_dtype, padded
from kvpress_kernels.reference.window_scores import DOMINANT

NUM_WARPS = 4
#: pages whose shares are read at once
SCAN = 512


@triton.jit
def load_sink(SINKS, row, head, n_kv_heads, GROUP: tl.constexpr):
    """Learned sink of a query head, -inf where SINKS is None."""
    sink = -float("inf")
    if SINKS is not None:
        sink = tl.load(SINKS + (row % n_kv_heads) * GROUP + head).to(tl.float32)
    return sink


@triton.jit
def is_removed(REMOVED, alone, page, n_pages):
    """Whether pages of a row are removed: those that REMOVED [M] says, or the page `alone` where it is None."""
    return page == alone if REMOVED is None else tl.load(REMOVED + page, mask=page < n_pages, other=0) != 0


@triton.jit
def change_without(
    PAGE_LSE,  # this row and head: [M], GROUP apart
    PAGE_VALUES,  # this row and head: [M, DV], GROUP * DV apart
    REMOVED,  # this row: [M]; None: the page `alone`
    alone,
    output,  # [DV]
    lse,
    sink,
    n_pages,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    DV_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
):
    """|output without pages - output| of one row and query head."""
    lost = 0.0
    kept_top = sink
    for start in range(0, n_pages, SCAN):
        page = start + tl.arange(0, SCAN)
        page_lse = tl.load(PAGE_LSE + page * GROUP, mask=page < n_pages, other=-float("inf"))
        gone = is_removed(REMOVED, alone, page, n_pages)
        lost += tl.sum(tl.where(gone, tl.exp(page_lse - lse), 0.0), 0)
        kept_top = tl.maximum(kept_top, tl.max(tl.where(gone, -float("inf"), page_lse), 0))

    left = kept_top > -float("inf")  # pages that are all that a query sees change nothing by definition
    most_is_lost = lost > 0.5
    top = tl.where(left, tl.where(most_is_lost, kept_top, lse), 0.0)
    value_dim = tl.arange(0, DV_PADDED)
    sink_weight = tl.where(most_is_lost, tl.exp(sink - top), 0.0)
    total = sink_weight
    moved = -sink_weight * output
    for start in range(0, n_pages, BLOCK):
        page = start + tl.arange(0, BLOCK)
        gone = is_removed(REMOVED, alone, page, n_pages)
        counts = (gone != most_is_lost) & (page < n_pages)  # kept pages, or removed ones
        page_lse = tl.load(PAGE_LSE + page * GROUP, mask=counts, other=-float("inf"))
        weight = tl.exp(page_lse - top)
        value_at = page.to(tl.int64)[:, None] * (GROUP * DV) + value_dim[None, :]
        mask = counts[:, None] & (value_dim < DV)[None, :]
        values = tl.load(PAGE_VALUES + value_at, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(weight, 0)
        moved += tl.sum(weight[:, None] * (values - output[None, :]), 0)
    divisor = tl.where(most_is_lost, total, 1.0 - lost)
    return tl.where(left, tl.sqrt(tl.sum(moved * moved, 0)) / tl.where(left, divisor, 1.0), 0.0)


@triton.jit
def _joint_change(
    PAGE_LSE,  # [R, M, G]
    PAGE_VALUES,  # [R, M, G, DV]
    OUTPUT,  # [R, G, DV]
    LSE,  # [R, G]
    LENGTHS,  # [R]
    REMOVED,  # [R, M]
    SINKS,  # [Hkv * G], or None
    CHANGE,  # [R, G]
    n_columns,  # M
    n_kv_heads,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    DV_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    value_dim = tl.arange(0, DV_PADDED)
    row_head = row * GROUP + head
    first = row * n_columns * GROUP + head
    change = change_without(
        PAGE_LSE + first,
        PAGE_VALUES + first * DV,
        REMOVED + row * n_columns,
        0,
        tl.load(OUTPUT + row_head * DV + value_dim, mask=value_dim < DV, other=0.0),
        tl.load(LSE + row_head),
        load_sink(SINKS, row, head, n_kv_heads, GROUP),
        tl.cdiv(tl.load(LENGTHS + row), PAGE),
        GROUP,
        DV,
        DV_PADDED,
        BLOCK,
        SCAN,
    )
    tl.store(CHANGE + row_head, change)


def joint_change(
    page_lse: Tensor,
    page_values: Tensor,
    output_wide: Tensor,
    lse: Tensor,
    lengths: Tensor,
    page_size: int,
    removed: Tensor,
    *,
    sinks: Tensor | None = None,
) -> Tensor:
    """|output without the pages `removed` - output|, [R, G] float32: the certificate of an eviction.

    Args:
        page_lse: [R, M, G] float32, page_values: [R, M, G, Dv], output_wide: [R, G, Dv] float32, lse: [R, G] float32,
            as `ragged_decode` returns them with statistics "values", for `lengths` [R] int32.
        removed: [R, M] bool; what it says beyond a row's pages is ignored.
        sinks: [Hkv * G] the learned sinks of that decode step; without them the result would be wrong.

    Returns:
        One number per row and query head. Pages that are all that a query sees change nothing by definition.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit together.
    """
    rows, columns, group, value_dim = check_statistics(page_lse, page_values, output_wide, lse, lengths, sinks)
    if removed.shape != (rows, columns) or removed.dtype != torch.bool:
        raise ValueError(f"removed must be [{rows}, {columns}] bool, got {removed.dtype} {tuple(removed.shape)}")
    check_device(page_lse, removed)
    change = torch.empty_like(lse)
    if rows:
        _joint_change[(rows, group)](
            page_lse,
            page_values,
            output_wide,
            lse,
            lengths,
            removed.contiguous().view(torch.uint8),
            None if sinks is None else sinks.contiguous(),
            change,
            columns,
            1 if sinks is None else sinks.numel() // group,
            **constants(page_size, group, value_dim),
            num_warps=NUM_WARPS,
        )
    return change


def check_statistics(
    page_lse: Tensor, page_values: Tensor, output_wide: Tensor, lse: Tensor, lengths: Tensor, sinks: Tensor | None
) -> tuple[int, int, int, int]:
    """R, M, G and Dv of a decode step's statistics; raises ValueError, in one sentence, where they do not fit together."""
    if page_values.dim() != 4:
        raise ValueError(f"page_values must be [R, M, G, Dv], got {tuple(page_values.shape)}")
    rows, columns, group, value_dim = page_values.shape
    shapes = {"page_lse": (rows, columns, group), "output_wide": (rows, group, value_dim), "lse": (rows, group)}
    for (name, shape), tensor in zip(shapes.items(), (page_lse, output_wide, lse), strict=True):
        if tensor.shape != shape or tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be {list(shape)} float32, got {tensor.dtype} {tuple(tensor.shape)}")
    if lengths.shape != (rows,) or lengths.dtype != torch.int32:
        raise ValueError(f"lengths must be [{rows}] int32, got {lengths.dtype} {tuple(lengths.shape)}")
    check_dtype(page_values, "page_values")
    if not all(tensor.is_contiguous() for tensor in (page_lse, page_values, output_wide, lse, lengths)):
        raise ValueError("the statistics of a decode step must be contiguous, as they were returned")
    if sinks is not None and (sinks.numel() == 0 or sinks.numel() % group or rows % (sinks.numel() // group)):
        raise ValueError(f"{sinks.numel()} sinks do not fit {rows} rows of {group} query heads")
    check_device(page_lse, page_values, output_wide, lse, lengths, sinks)
    return rows, columns, group, value_dim


def constants(page_size: int, group: int, value_dim: int) -> dict[str, int]:
    """Constexpr arguments that describe a decode step's statistics; BLOCK rows of values are read at once."""
    block = min(64, 4096 // padded(value_dim))
    return {
        "PAGE": page_size, "GROUP": group, "DV": value_dim, "DV_PADDED": padded(value_dim), "BLOCK": block,
        "SCAN": SCAN,
    }  # fmt: skip


def compile_cases(arch: str) -> list[CompileCase]:
    """The configurations that are compiled and inspected without a device."""
    shipped = [(64, "bf16", False), (128, "bf16", True), (256, "bf16", False), (80, "fp32", True)]
    return [case(_joint_change, *which) for which in shipped]


def case(kernel: Any, value_dim: int, number: str, sinks: bool) -> CompileCase:
    """A configuration of a kernel that reads a decode step's statistics."""
    known = {"PAGE_LSE": "*fp32", "PAGE_VALUES": f"*{number}", "OUTPUT": "*fp32", "LSE": "*fp32", "LENGTHS": "*i32"}
    known |= {"REMOVED": "*u8", "MASS": "*fp32", "CHANGE": "*fp32", "n_columns": "i32", "n_kv_heads": "i32"}
    known |= {"SINKS": f"*{number}"} if sinks else {}
    types = {name: known[name] for name in kernel.arg_names if name in known}
    values: dict[str, Any] = {**constants(32, 4, value_dim), "SINKS": None, "DOMINANT": DOMINANT}
    values = {name: values[name] for name in kernel.arg_names if name in values and name not in types}
    op, name = kernel.__module__.rpartition(".")[2], kernel.__name__.strip("_")
    config = f"{'' if name == op else name + ' '}D{value_dim} {number}{' sinks' if sinks else ''}"
    return CompileCase(op, config, kernel, types, values, NUM_WARPS, num_stages=3)
