"""Joins the partial results of a row's items, adds the learned sink, and divides by the sum of the weights.

Formulas, and what is returned: `kvpress_kernels.reference.split_reduce`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress_kernels.launch import CompileCase, check_device, padded
from kvpress_kernels.reference.split_reduce import Reduced

#: items joined at once
BLOCK_ITEMS = 16
NUM_WARPS = 4


@triton.jit
def _join_items(
    PARTIAL_OUTPUT,  # [I, G, DV]
    PARTIAL_MAX,  # [I, G] in powers of two
    PARTIAL_SUM,  # [I, G]
    FIRST_ITEM,  # [R + 1], or None: every row has `row_items`
    SINKS,  # [Hkv * G] natural, or None
    OUTPUT,  # [R, G, DV]
    OUTPUT_WIDE,  # [R, G, DV]
    LSE,  # [R, G]
    row_items,
    n_kv_heads,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if FIRST_ITEM is None:
        first = row * row_items
        last = first + row_items
    else:
        first = tl.load(FIRST_ITEM + row).to(tl.int64)
        last = tl.load(FIRST_ITEM + row + 1).to(tl.int64)
    value_dim = tl.arange(0, VALUE_PADDED)
    is_value = value_dim < VALUE_DIM

    largest = -float("inf")
    total = 0.0
    if SINKS is not None:
        largest = tl.load(SINKS + (row % n_kv_heads) * GROUP + head).to(tl.float32) * 1.4426950408889634
        total = 1.0
    output = tl.zeros([VALUE_PADDED], tl.float32)
    for start in range(first, last, BLOCK_ITEMS):
        item = start + tl.arange(0, BLOCK_ITEMS)
        item_max = tl.load(PARTIAL_MAX + item * GROUP + head, mask=item < last, other=-float("inf"))
        found = item_max > -float("inf")  # an item without pages has written no output
        item_sum = tl.load(PARTIAL_SUM + item * GROUP + head, mask=found, other=0.0)
        output_at = (item * GROUP + head)[:, None] * VALUE_DIM + value_dim[None, :]
        item_output = tl.load(PARTIAL_OUTPUT + output_at, mask=found[:, None] & is_value[None, :], other=0.0)
        new_largest = tl.maximum(largest, tl.max(item_max, 0))
        reference = tl.where(new_largest > -float("inf"), new_largest, 0.0)  # -inf - -inf is no number
        weights = tl.exp2(item_max - reference)
        rescale = tl.exp2(largest - reference)
        total = total * rescale + tl.sum(weights * item_sum, 0)
        output = output * rescale + tl.sum(weights[:, None] * item_output, 0)
        largest = new_largest

    seen = total > 0
    divisor = tl.where(seen, total, 1.0)
    output = output / divisor
    lse = tl.where(seen, (largest + tl.log2(divisor)) * 0.6931471805599453, -float("inf"))
    row_at = row * GROUP + head
    tl.store(OUTPUT_WIDE + row_at * VALUE_DIM + value_dim, output, mask=is_value)
    tl.store(OUTPUT + row_at * VALUE_DIM + value_dim, output.to(OUTPUT.dtype.element_ty), mask=is_value)
    tl.store(LSE + row_at, lse)


def split_reduce(
    partial_output: Tensor,
    partial_max: Tensor,
    partial_sum: Tensor,
    first_item: Tensor | int,
    *,
    group_sinks: Tensor | None = None,
    n_kv_heads: int,
    dtype: torch.dtype,
) -> Reduced:
    """Attention of each row from the partial results of its items.

    Args:
        partial_output: [I, G, Dv] sum of 2^(logit - max) v. partial_max: [I, G] in powers of two; -inf where an item
            found nothing, and its output is then not read. partial_sum: [I, G] sum of 2^(logit - max). All float32 and
            contiguous.
        first_item: [R + 1] int32; row r has the items first_item[r] to first_item[r + 1] - 1; items beyond
            first_item[R] are not read. An integer says that every row has that many.
        group_sinks: [Hkv * G] natural logits that join the denominator with value 0.
        n_kv_heads: row r belongs to KV head r % n_kv_heads.
        dtype: of the output.

    Returns:
        `Reduced`; a row that saw nothing gives zeros, and an lse of -inf unless there is a sink.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit together.
    """
    items, group, value_dim = partial_output.shape
    uniform = isinstance(first_item, int)
    rows = items // max(first_item, 1) if isinstance(first_item, int) else first_item.numel() - 1
    _check(partial_output, partial_max, partial_sum, first_item, rows, group_sinks, n_kv_heads)
    output = partial_output.new_empty((rows, group, value_dim), dtype=dtype)
    output_wide = partial_output.new_empty((rows, group, value_dim))
    lse = partial_output.new_empty((rows, group))
    if rows:
        _join_items[(rows, group)](
            partial_output,
            partial_max,
            partial_sum,
            None if uniform else first_item,
            None if group_sinks is None else group_sinks.contiguous(),
            output,
            output_wide,
            lse,
            first_item if uniform else 0,
            n_kv_heads,
            GROUP=group,
            VALUE_DIM=value_dim,
            VALUE_PADDED=padded(value_dim),
            BLOCK_ITEMS=BLOCK_ITEMS,
            num_warps=NUM_WARPS,
        )
    return Reduced(output, output_wide, lse)


def _check(
    partial_output: Tensor,
    partial_max: Tensor,
    partial_sum: Tensor,
    first_item: Tensor | int,
    rows: int,
    group_sinks: Tensor | None,
    n_kv_heads: int,
) -> None:
    """Raise ValueError, in one sentence, where the operands do not fit together."""
    items, group, _ = partial_output.shape
    partials = (partial_output, partial_max, partial_sum)
    if isinstance(first_item, int):
        check_device(*partials, group_sinks)
        if first_item < 1 or items % first_item:
            raise ValueError(f"{items} items cannot be {first_item} for every row")
    else:
        check_device(*partials, first_item, group_sinks)
        if first_item.dtype != torch.int32 or first_item.dim() != 1 or not first_item.is_contiguous():
            raise ValueError("first_item must be int32 [R + 1] and contiguous, or one number of items for every row")
    if any(part.dtype != torch.float32 or not part.is_contiguous() for part in partials):
        raise ValueError("partial results must be float32 and contiguous")
    if partial_max.shape != (items, group) or partial_sum.shape != (items, group):
        raise ValueError(
            f"partial_max and partial_sum must be [{items}, {group}] as partial_output is, "
            f"got {list(partial_max.shape)} and {list(partial_sum.shape)}"
        )
    if rows % n_kv_heads:
        raise ValueError(f"{rows} rows are no multiple of {n_kv_heads} KV heads")
    if group_sinks is not None and group_sinks.numel() != n_kv_heads * group:
        raise ValueError(f"sinks must hold {n_kv_heads * group} logits, one per query head, got {group_sinks.numel()}")


def compile_cases(arch: str) -> list[CompileCase]:
    """The configurations that are compiled and inspected without a device."""
    plain = [_case(dim, "bf16", balanced=False, sinks=False) for dim in (16, 64, 80, 128, 256)]
    listed = [_case(dim, "bf16", balanced=True, sinks=sinks) for dim, sinks in ((64, False), (128, True))]
    return [*plain, *listed, _case(192, "fp32", balanced=False, sinks=True)]


def _case(value_dim: int, number: str, *, balanced: bool, sinks: bool) -> CompileCase:
    types = dict.fromkeys(("PARTIAL_OUTPUT", "PARTIAL_MAX", "PARTIAL_SUM", "OUTPUT_WIDE", "LSE"), "*fp32")
    types |= {"OUTPUT": f"*{number}", "row_items": "i32", "n_kv_heads": "i32"}
    constants: dict[str, int | None] = {
        "GROUP": 4, "VALUE_DIM": value_dim, "VALUE_PADDED": padded(value_dim), "BLOCK_ITEMS": BLOCK_ITEMS,
    }  # fmt: skip
    for name, kind, given in (("FIRST_ITEM", "*i32", balanced), ("SINKS", f"*{number}", sinks)):
        if given:
            types[name] = kind
        else:
            constants[name] = None
    config = f"D{value_dim} {number}{' balanced' if balanced else ''}{' sinks' if sinks else ''}"
    return CompileCase("split_reduce", config, _join_items, types, constants, NUM_WARPS, num_stages=2)
