"""Softmax statistics of a set of queries over dense keys: the first pass of `window_scores` and `cumulative_mass`.

For every query the largest logit and the sum of exponentials, and, where values are given, the attention output. Keys
are cut into chunks that are attended separately (flash decoding) and joined by a second small kernel. Nothing of size
queries x tokens reaches memory. Rows are (query head g, query q) pairs in the order g * Q + q.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress_kernels.launch import CompileCase, architecture, n_processors, padded
from kvpress_kernels.window_problem import (
    ALIGNED,
    Problem,
    device_class,
    logits_log2,
    optional,
    shared_constants,
    shared_types,
)


@dataclass(frozen=True)
class Attended:
    """Per row: largest logit (log2) and sum of exp2(logit - largest) [S, G, Q] float32, sinks included; the output
    minus the centre of the values [S, G, Q, Dv] float32. A row that sees nothing has sum 0 and output 0."""

    largest: Tensor
    total: Tensor
    output: Tensor | None


# sizes are not specialised: each new prompt length would compile again
@triton.jit(do_not_specialize=["n_queries", "n_rows", "chunk"])
def _attend_chunk(
    QUERY, KEYS, VALUES, CENTRE, VISIBLE, LEFT_OUT, UNIT_OF, LARGEST, TOTAL, OUTPUT,
    scale, ceiling, n_queries, n_rows, chunk,
    query_head, query_group, query_token, key_head, key_token, value_head, value_token,
    KEY_DIM: tl.constexpr, KEY_DIM_PADDED: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_DIM_PADDED: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of rows over one chunk of keys, to partial results [S, chunks, G * Q].

    LEFT_OUT [S, G * Q]: attend without this unit, and only for rows where there is one; UNIT_OF [N] is the unit of each
    token (None: its index).
    """
    piece, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < n_rows
    key_lane, value_lane, token_lane = (
        tl.arange(0, KEY_DIM_PADDED),
        tl.arange(0, VALUE_DIM_PADDED),
        tl.arange(0, TOKENS),
    )
    visible = tl.load(VISIBLE + row % n_queries, mask=real, other=0)
    if LEFT_OUT is not None:
        left_out = tl.load(LEFT_OUT + head * n_rows + row, mask=real, other=-1)
        visible = tl.where(left_out >= 0, visible, 0)
    first = piece * chunk
    last = tl.minimum(first + chunk, tl.max(visible, 0))
    rows = QUERY + head * query_head + (row // n_queries).to(tl.int64) * query_group
    rows += (row % n_queries).to(tl.int64) * query_token
    query = tl.load(rows[:, None] + key_lane, mask=(visible > 0)[:, None] & (key_lane < KEY_DIM), other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if VALUES is not None:
        rounded_total = tl.zeros([ROWS], tl.float32)
        output = tl.zeros([ROWS, VALUE_DIM_PADDED], tl.float32)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        token = start + token_lane
        keys = KEYS + head * key_head + tl.cast(start, tl.int64) * key_token
        key = tl.load(
            keys + token_lane[None, :] * key_token + key_lane[:, None],
            mask=(token < last)[None, :] & (key_lane < KEY_DIM)[:, None],
            other=0.0,
        )
        if UPCAST:
            key = key.to(tl.float32)
        logits = logits_log2(tl.dot(query, key, input_precision="ieee"), scale, ceiling, SOFTCAP)
        seen = token[None, :] < visible[:, None]
        if LEFT_OUT is not None:
            unit = token
            if UNIT_OF is not None:
                unit = tl.load(UNIT_OF + token, mask=token < last, other=-1)
            seen &= unit[None, :] != left_out[:, None]
        logits = tl.where(seen, logits, -float("inf"))
        higher = tl.maximum(largest, tl.max(logits, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        share = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(share, 1)
        if VALUES is not None:
            values = VALUES + head * value_head + tl.cast(start, tl.int64) * value_token
            value = tl.load(
                values + token_lane[:, None] * value_token + value_lane[None, :],
                mask=(token < last)[:, None] & (value_lane < VALUE_DIM)[None, :],
                other=0.0,
            )
            if UPCAST:
                value = value.to(tl.float32)
            rounded = share.to(value.dtype)
            rounded_total = rounded_total * shrink + tl.sum(rounded.to(tl.float32), 1)
            output = tl.dot(rounded, value, output * shrink[:, None], input_precision="ieee")
        largest = higher
    at = (head * tl.num_programs(1) + piece) * n_rows + row
    tl.store(LARGEST + at, largest, mask=real)
    tl.store(TOTAL + at, total, mask=real)
    if VALUES is not None:
        # the sum of the rounded shares belongs to `output`: with it, what all values have in common cancels exactly
        centre = tl.load(CENTRE + head * VALUE_DIM + value_lane, mask=value_lane < VALUE_DIM, other=0.0)
        attended = total > 0
        output = (output - rounded_total[:, None] * centre) / tl.where(attended, total, 1.0)[:, None]
        tl.store(
            OUTPUT + at[:, None] * VALUE_DIM + value_lane,
            output,
            mask=(real & attended)[:, None] & (value_lane < VALUE_DIM),
        )


@triton.jit(do_not_specialize=["n_pieces", "n_queries", "n_rows"])
def _combine(
    LARGEST, TOTAL, OUTPUT, SINKS, CENTRE, JOINT_LARGEST, JOINT_TOTAL, JOINT_OUTPUT, n_pieces, n_queries, n_rows,
    VALUE_DIM: tl.constexpr, VALUE_DIM_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Join the chunks of a tile of rows; a learned sink [S, G] is one more logit, of value 0."""
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < n_rows
    value_lane = tl.arange(0, VALUE_DIM_PADDED)
    joint = tl.full([ROWS], -float("inf"), tl.float32)
    if SINKS is not None:
        group = tl.cdiv(n_rows, n_queries)
        sink = tl.load(SINKS + head * group + row // n_queries, mask=real, other=0.0) * 1.4426950408889634
        joint = sink
    for piece in range(n_pieces):
        at = (head * n_pieces + piece) * n_rows + row
        joint = tl.maximum(joint, tl.load(LARGEST + at, mask=real, other=-float("inf")))
    base = tl.where(joint == -float("inf"), 0.0, joint)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS is not None:
        sink_part = tl.exp2(sink - base)
        total = sink_part
    if OUTPUT is not None:
        output = tl.zeros([ROWS, VALUE_DIM_PADDED], tl.float32)
    for piece in range(n_pieces):
        at = (head * n_pieces + piece) * n_rows + row
        part = tl.load(TOTAL + at, mask=real, other=0.0)
        part *= tl.exp2(tl.load(LARGEST + at, mask=real, other=-float("inf")) - base)
        total += part
        if OUTPUT is not None:
            mask = (real & (part > 0))[:, None] & (value_lane < VALUE_DIM)  # a chunk that a row does not see wrote none
            output += part[:, None] * tl.load(OUTPUT + at[:, None] * VALUE_DIM + value_lane, mask=mask, other=0.0)
    at = head * n_rows + row
    tl.store(JOINT_LARGEST + at, base, mask=real)
    tl.store(JOINT_TOTAL + at, total, mask=real)
    if OUTPUT is not None:
        if SINKS is not None:  # its value is 0, not the centre
            centre = tl.load(CENTRE + head * VALUE_DIM + value_lane, mask=value_lane < VALUE_DIM, other=0.0)
            output -= sink_part[:, None] * centre
        output /= tl.where(total > 0, total, 1.0)[:, None]
        tl.store(
            JOINT_OUTPUT + at[:, None] * VALUE_DIM + value_lane, output, mask=real[:, None] & (value_lane < VALUE_DIM)
        )


def attend(problem: Problem, left_out: Tensor | None = None, unit_of: Tensor | None = None) -> Attended:
    """Softmax statistics of every row, and its output where the problem has values.

    left_out: [S, G, Q] int32, a unit without which a row attends; rows with -1 are skipped, they see nothing.
    unit_of: [N] int32 unit of each token, -1 where it belongs to none; None: every token is a unit.
    """
    n_heads, group, n_queries, key_dim = problem.query.shape
    n_tokens, n_rows, value_dim = problem.keys.shape[1], problem.n_rows, problem.value_dim
    device = problem.query.device
    rows, tokens, warps, stages = launch_sizes(
        architecture(device), max(key_dim, value_dim), problem.keys.element_size(), n_rows
    )
    tiles = triton.cdiv(n_rows, rows)
    # enough programs to fill the device four times, but no chunk of fewer than eight tiles
    pieces = triton.cdiv(4 * n_processors(device), n_heads * tiles)
    pieces = max(1, min(pieces, triton.cdiv(n_tokens, 8 * tokens)))
    chunk = triton.cdiv(triton.cdiv(n_tokens, pieces), tokens) * tokens
    largest, total = torch.empty((2, n_heads, pieces, n_rows), dtype=torch.float32, device=device)
    output = (
        None
        if problem.values is None
        else torch.empty((n_heads, pieces, n_rows, value_dim), dtype=torch.float32, device=device)
    )
    _attend_chunk[tiles, pieces, n_heads](
        problem.query, problem.keys, problem.values, problem.centre, problem.visible, left_out, unit_of,
        largest, total, output, *problem.logit_factors(), n_queries, n_rows, chunk, *problem.strides(),
        **problem.dims(), ROWS=rows, TOKENS=tokens, STAGES=stages, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    joint_largest, joint_total = torch.empty((2, n_heads, group, n_queries), dtype=torch.float32, device=device)
    joint_output = (
        None
        if output is None
        else torch.empty((n_heads, group, n_queries, value_dim), dtype=torch.float32, device=device)
    )
    _combine[triton.cdiv(n_rows, 16), n_heads](
        largest, total, output, problem.sinks, problem.centre, joint_largest, joint_total, joint_output,
        pieces, n_queries, n_rows, VALUE_DIM=value_dim, VALUE_DIM_PADDED=padded(max(value_dim, 1)), ROWS=16, num_warps=4,
    )  # fmt: skip
    return Attended(joint_largest, joint_total, joint_output)


def launch_sizes(arch: str, dim: int, itemsize: int, n_rows: int) -> tuple[int, int, int, int]:
    """(rows of a tile, tokens of a tile, warps, stages) of the first pass."""
    device, few = device_class(arch), n_rows <= 64
    if device == "interpreter":
        return 32, 32, 4, 2
    if device == "amd":  # as many warps as have 16 bytes of a tile to load for each of 64 lanes
        warps = 4 if dim <= 64 else 8
        return (32, 16, warps, 1) if itemsize == 4 else (64 if few or dim > 128 else 128, 32, warps, 1)
    if itemsize == 4:
        return 32, 16, 8, 3
    if device == "hopper":
        return (64, 32, (4 if dim <= 128 else 8), 3) if few else (128, (64 if dim <= 128 else 32), 8, 3)
    if few or dim > 128:
        return 64, 32, 8, (2 if device == "small" and dim > 128 else 3)
    return 128, (64 if dim <= 64 else 32), 8, 3


def compile_cases(arch: str, modes: Collection[str] = ("values", "rest", "combine")) -> list[CompileCase]:
    """The first pass with values, for masses alone, and without a dominant unit; and the kernel that joins chunks."""
    cases = []
    for dim, dtype, n_rows, mode in (
        *((dim, "bf16", 128, "values") for dim in (64, 80, 128, 192, 256)),
        (128, "bf16", 64, "values"), (128, "fp32", 128, "values"),
        (128, "bf16", 128, "rest units"), (256, "bf16", 128, "rest softcap"),
        (64, "bf16", 128, "mass"), (128, "bf16", 128, "mass"), (256, "bf16", 128, "mass softcap"),
    ):  # fmt: skip
        if mode.split()[0] not in modes:
            continue
        values = "mass" not in mode
        rows, tokens, warps, stages = launch_sizes(arch, dim, 4 if dtype == "fp32" else 2, n_rows)
        types = {**shared_types(dtype, values), "n_rows": "i32", "chunk": "i32"}
        constants = shared_constants(dim, values, "softcap" in mode)
        constants |= {"ROWS": rows, "TOKENS": tokens, "STAGES": stages}
        optional(types, constants, "rest" in mode, "*i32", "LEFT_OUT")
        optional(types, constants, "units" in mode, "*i32", "UNIT_OF")
        optional(types, constants, values, "*fp32", "OUTPUT")
        label, aligned = f"attend D{dim} M{rows} {dtype} {mode}", ALIGNED | {"chunk"}
        cases.append(
            CompileCase("window_attention", label, _attend_chunk, types, constants, warps, stages, aligned, True)
        )
    if "combine" in modes:
        tensors = ("LARGEST", "TOTAL", "OUTPUT", "SINKS", "CENTRE", "JOINT_LARGEST", "JOINT_TOTAL", "JOINT_OUTPUT")
        types = dict.fromkeys(tensors, "*fp32") | dict.fromkeys(("n_pieces", "n_queries", "n_rows"), "i32")
        constants = {"VALUE_DIM": 256, "VALUE_DIM_PADDED": 256, "ROWS": 16}
        cases.append(CompileCase("window_attention", "combine D256", _combine, types, constants, 4, 2))
    return cases
