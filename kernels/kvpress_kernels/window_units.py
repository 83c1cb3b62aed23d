"""Second pass of `window_scores` where units are sets of tokens: one program per few units and query heads.

Logits are recomputed as queries x tokens of one unit, whose keys and values are gathered through its slots:

    a = sum_i p_i,  s = sum_i p_i v_i,  |g|^2 = |s - a o|^2       per query, then reduced over the queries at once
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvpress_kernels.launch import CompileCase, architecture, padded
from kvpress_kernels.reference.window_scores import DOMINANT, MIN_REST
from kvpress_kernels.window_attention import Attended
from kvpress_kernels.window_problem import (
    ALIGNED,
    Problem,
    device_class,
    logits_log2,
    optional,
    shared_constants,
    shared_types,
)
from kvpress_kernels.window_tokens import Outputs


@triton.jit(do_not_specialize=["n_units", "unit_size", "n_queries", "group", "parts"])
def _score_units(
    QUERY, KEYS, VALUES, CENTRE, SLOTS, VISIBLE, WEIGHTS, LARGEST, TOTAL, OUTPUT,
    MASS, MASS_SQUARED, COVERAGE, CHANGE, DOMINANT_UNIT,
    scale, ceiling, double_alpha, n_units, unit_size, n_queries, group, parts,
    query_head, query_group, query_token, key_head, key_token, value_head, value_token,
    KEY_DIM: tl.constexpr, KEY_DIM_PADDED: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_DIM_PADDED: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr,
    UNITS: tl.constexpr, ONE_TILE: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr, MAXIMUM: tl.constexpr, WEIGH_REST: tl.constexpr,
    DOMINANT_MASS: tl.constexpr, LEAST_REST: tl.constexpr,
):  # fmt: skip
    """UNITS units against all queries of HEADS query heads; a tile has HEADS * QUERIES rows.

    SLOTS [U, unit_size] int32, -1 where a unit is short. A unit takes `parts` tiles of TOKENS slots (WHOLE: one), the
    queries any number of tiles (ONE_TILE: one, as in a window).
    OUTPUT [S, G * Q, Dv] float32, measured from CENTRE.
    """
    ROWS: tl.constexpr = HEADS * QUERIES
    head = tl.program_id(2).to(tl.int64)
    row_lane, token_lane, unit_lane = tl.arange(0, ROWS), tl.arange(0, TOKENS), tl.arange(0, UNITS)
    key_lane, value_lane = tl.arange(0, KEY_DIM_PADDED), tl.arange(0, VALUE_DIM_PADDED)
    row_head = tl.program_id(0) * HEADS + row_lane // QUERIES
    first_unit = tl.program_id(1) * UNITS
    steps = tl.minimum(UNITS, n_units - first_unit) * parts
    keys = KEYS + head * key_head
    if CHANGE is not None:
        values = VALUES + head * value_head
        centre = tl.load(CENTRE + head * VALUE_DIM + value_lane, mask=value_lane < VALUE_DIM, other=0.0)
    mass = tl.zeros([HEADS, UNITS], tl.float32)
    mass_squared = tl.zeros([HEADS, UNITS], tl.float32)
    coverage = tl.zeros([HEADS, UNITS], tl.float32)
    change = tl.zeros([HEADS, UNITS], tl.float32)
    for first_query in range(0, QUERIES if ONE_TILE else n_queries, QUERIES):
        query_index = first_query + row_lane % QUERIES
        real = (query_index < n_queries) & (row_head < group)
        visible = tl.load(VISIBLE + query_index, mask=real, other=0)
        weight = tl.load(WEIGHTS + query_index, mask=real, other=0.0)
        rows = QUERY + head * query_head + row_head.to(tl.int64) * query_group + query_index.to(tl.int64) * query_token
        query = tl.load(rows[:, None] + key_lane, mask=real[:, None] & (key_lane < KEY_DIM), other=0.0)
        if UPCAST:
            query = query.to(tl.float32)
        row = (head * group + row_head) * n_queries + query_index
        largest = tl.load(LARGEST + row, mask=real, other=0.0)
        total = tl.load(TOTAL + row, mask=real, other=0.0)
        scaling = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
        unit_mass = tl.zeros([ROWS], tl.float32)
        inside = tl.zeros([ROWS], tl.int32)
        if CHANGE is not None:
            output = tl.load(
                OUTPUT + row[:, None] * VALUE_DIM + value_lane,
                mask=real[:, None] & (value_lane < VALUE_DIM),
                other=0.0,
            )
            output += centre[None, :]
            if not WHOLE:
                shift = tl.zeros([ROWS, VALUE_DIM_PADDED], tl.float32)
        # the next slots travel in a loop variable, so that loads of keys and values stay in the software pipeline
        next_slot = tl.load(
            SLOTS + first_unit.to(tl.int64) * unit_size + token_lane, mask=token_lane < unit_size, other=-1
        )
        for step in tl.range(0, steps, 1, num_stages=STAGES):
            slot = next_slot
            following = step + 1
            lane = (following % parts) * TOKENS + token_lane
            next_slot = tl.load(
                SLOTS + tl.cast(first_unit + following // parts, tl.int64) * unit_size + lane,
                mask=lane < tl.where(following < steps, unit_size, 0),
                other=-1,
            )
            part = step % parts
            fresh = tl.where(part == 0, 0.0, 1.0)
            key = tl.load(
                keys + slot.to(tl.int64)[None, :] * key_token + key_lane[:, None],
                mask=(slot >= 0)[None, :] & (key_lane < KEY_DIM)[:, None],
                other=0.0,
            )
            if UPCAST:
                key = key.to(tl.float32)
            logits = logits_log2(tl.dot(query, key, input_precision="ieee"), scale, ceiling, SOFTCAP)
            seen = (slot >= 0)[None, :] & (slot[None, :] < visible[:, None])
            share = tl.where(seen, tl.exp2(logits - largest[:, None]) * scaling[:, None], 0.0)
            unit_mass = unit_mass * fresh + tl.sum(share, 1)
            # a row's largest logit was found by another kernel: rounding must not make a share exceed 1
            held = tl.minimum(unit_mass, 1.0)
            here = (unit_lane == tl.where(part == parts - 1, step // parts, -1))[None, :]
            if MASS is not None:
                mass = _entered(mass, held, weight, here, HEADS, QUERIES, MAXIMUM)
            if MASS_SQUARED is not None:
                mass_squared = _entered(mass_squared, held * held, weight, here, HEADS, QUERIES, MAXIMUM)
            if COVERAGE is not None:
                inside = tl.where(part == 0, 0, inside) + tl.sum(seen.to(tl.int32), 1)
                uniform = inside.to(tl.float32) / tl.maximum(visible, 1).to(tl.float32) * (1.0 + 1e-6)
                covered = ((held > uniform) & (inside > 0)).to(tl.float32)
                coverage = _entered(coverage, covered, weight, here, HEADS, QUERIES, MAXIMUM)
            if CHANGE is not None:
                value = tl.load(
                    values + slot.to(tl.int64)[:, None] * value_token + value_lane[None, :],
                    mask=(slot >= 0)[:, None] & (value_lane < VALUE_DIM)[None, :],
                    other=0.0,
                )
                if UPCAST:
                    value = value.to(tl.float32)
                # shares relative to the largest, since half precision ends where shares of long contexts begin; the sum
                # of what is rounded goes with the output, so that what all values have in common cancels exactly
                top = tl.max(share, 1)
                rounded = (share * tl.where(top > 0, 1.0 / tl.where(top > 0, top, 1.0), 0.0)[:, None]).to(value.dtype)
                weighted = tl.dot(rounded, value, input_precision="ieee")
                weighted = (weighted - tl.sum(rounded.to(tl.float32), 1)[:, None] * output) * top[:, None]
                shift = weighted if WHOLE else shift * fresh + weighted
                moved = tl.sum(shift * shift, 1)
                if WEIGH_REST:
                    moved *= tl.exp2(-double_alpha * tl.log2(tl.maximum(1.0 - held, LEAST_REST)))
                heavy = held > tl.where(part == parts - 1, DOMINANT_MASS, 2.0)
                tl.store(DOMINANT_UNIT + row, first_unit + step // parts, mask=heavy & real)
                moved = tl.where(heavy, 0.0, moved)
                change = _entered(change, moved, weight, here, HEADS, QUERIES, MAXIMUM)
    out_head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    at = ((head * group + out_head) * n_units + first_unit)[:, None] + unit_lane[None, :]
    mask = (out_head < group)[:, None] & (first_unit + unit_lane < n_units)[None, :]
    if MASS is not None:
        tl.store(MASS + at, mass, mask=mask)
    if MASS_SQUARED is not None:
        tl.store(MASS_SQUARED + at, mass_squared, mask=mask)
    if COVERAGE is not None:
        tl.store(COVERAGE + at, coverage, mask=mask)
    if CHANGE is not None:
        tl.store(CHANGE + at, change, mask=mask)


@triton.jit
def _entered(
    so_far, statistic, weight, here, HEADS: tl.constexpr, QUERIES: tl.constexpr, MAXIMUM: tl.constexpr
):  # fmt: skip
    """A statistic [heads * queries] of one unit joined to so_far [heads, units] where `here` [1, units] says so."""
    if MAXIMUM:
        reduced = tl.max(tl.reshape(statistic, [HEADS, QUERIES]), 1)
        return tl.where(here, tl.maximum(so_far, reduced[:, None]), so_far)
    reduced = tl.sum(tl.reshape(statistic * weight, [HEADS, QUERIES]), 1)
    return so_far + tl.where(here, reduced[:, None], 0.0)


def score_units(
    problem: Problem, attended: Attended, weights: Tensor, unit_slots: Tensor, outputs: Outputs, reducer: str
) -> None:
    """Fill `outputs`; unit_slots: [U, P] int32, -1 where a unit is short. No token may be in two units."""
    n_heads, group, n_queries, key_dim = problem.query.shape
    n_units, unit_size = unit_slots.shape
    sizes = launch_sizes(
        architecture(problem.query.device),
        max(key_dim, 0 if outputs.change is None else problem.value_dim),
        problem.keys.element_size(),
        n_queries, group, unit_size,
    )  # fmt: skip
    parts = triton.cdiv(unit_size, sizes["TOKENS"])
    grid = (triton.cdiv(group, sizes["HEADS"]), triton.cdiv(n_units, sizes["UNITS"]), n_heads)
    _score_units[grid](
        problem.query, problem.keys, None if outputs.change is None else problem.values, problem.centre, unit_slots,
        problem.visible, weights, attended.largest, attended.total, attended.output,
        outputs.mass, outputs.mass_squared, outputs.coverage, outputs.change, outputs.dominant,
        *problem.logit_factors(), 2.0 * outputs.alpha, n_units, unit_size, n_queries, group, parts, *problem.strides(),
        **problem.dims(), **sizes, ONE_TILE=n_queries <= sizes["QUERIES"], WHOLE=parts == 1, MAXIMUM=reducer == "max", WEIGH_REST=outputs.alpha != 0,
        DOMINANT_MASS=DOMINANT, LEAST_REST=MIN_REST,
    )  # fmt: skip


def launch_sizes(arch: str, dim: int, itemsize: int, n_queries: int, group: int, unit_size: int) -> dict[str, int]:
    """Sizes of the tiles of the second pass over units, and its launch options."""
    device, half = device_class(arch), itemsize == 2
    tokens, units, warps, stages, lanes = 32, 16, 8, 3, 32
    rows = 64 if half and (dim <= 64 or (device == "hopper" and dim <= 128)) else 32
    if device == "interpreter":
        tokens, units, warps, stages = 16, 4, 4, 2
    elif device == "amd":
        rows, warps, stages, lanes = 32, 4, 1, 64
    if dim > 128 or not half:
        tokens, units = 16, 8
    queries, tokens = min(rows, padded(n_queries)), min(tokens, padded(unit_size))
    warps = min(warps, tokens * padded(dim) * itemsize // (16 * lanes))  # as many as load 16 bytes of a tile a lane
    return {
        "HEADS": min(2, rows // queries, triton.next_power_of_2(group)), "QUERIES": queries, "TOKENS": tokens,
        "UNITS": units, "STAGES": stages, "num_warps": max(1, warps), "num_stages": stages,
    }  # fmt: skip


def compile_cases(arch: str) -> list[CompileCase]:
    """The second pass over units; "all" adds mass, its square and coverage.

    Where queries take several tiles, tiles of theirs are loaded in an outer loop, and what the report says of loads in
    loops is not about keys and values alone.
    """
    cases = []
    for dim, dtype, n_queries, unit_size, mode in (
        (64, "bf16", 64, 16, "change"), (96, "bf16", 32, 16, "change"), (256, "bf16", 32, 16, "change"),
        (128, "bf16", 64, 64, "change"), (80, "bf16", 16, 32, "change all"), (128, "bf16", 512, 16, "change"),
        (128, "fp16", 32, 16, "change max softcap"), (128, "fp32", 32, 16, "change all"),
    ):  # fmt: skip
        sizes = launch_sizes(arch, dim, 4 if dtype == "fp32" else 2, n_queries, 4, unit_size)
        warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
        types = {**shared_types(dtype, True), "SLOTS": "*i32", "DOMINANT_UNIT": "*i32", "double_alpha": "fp32"}
        types |= dict.fromkeys(("WEIGHTS", "OUTPUT", "CHANGE"), "*fp32")
        types |= dict.fromkeys(("n_units", "unit_size", "group", "parts"), "i32")
        one_tile = n_queries <= sizes["QUERIES"]
        constants = {
            **shared_constants(dim, True, "softcap" in mode), **sizes, "ONE_TILE": one_tile,
            "WHOLE": unit_size <= sizes["TOKENS"],
            "MAXIMUM": "max" in mode, "WEIGH_REST": True, "DOMINANT_MASS": DOMINANT, "LEAST_REST": MIN_REST,
        }  # fmt: skip
        optional(types, constants, "all" in mode, "*fp32", "MASS", "MASS_SQUARED", "COVERAGE")
        label = f"D{dim} Q{n_queries} unit {unit_size} {dtype} {mode}"
        cases.append(
            CompileCase("window_units", label, _score_units, types, constants, warps, stages, ALIGNED, kv_loop=one_tile)
        )
    return cases
