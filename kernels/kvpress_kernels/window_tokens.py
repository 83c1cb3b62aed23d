"""Second pass of `window_scores` where every token is a unit, and of `cumulative_mass`: one program per tile of tokens.

Logits are recomputed as keys x queries, so that the sum over queries runs along a row of the tile and a window of 16
queries wastes nothing. Each statistic leaves the kernel as one number per token and query head.

    |g|^2 = a^2 |v - o|^2,   |v - o|^2 = |v|^2 - 2 v.o + |o|^2   with v and o measured from the centre of the values
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
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


@dataclass(frozen=True)
class Outputs:
    """Where the second pass writes: [S, G, U] float32 zeros per statistic, None for those not asked for.

    dominant: [S, G, Q] int32, filled with -1: the unit that holds more than DOMINANT of a row's mass; its part of
    `change` is left out. alpha: exponent of `change`.
    """

    mass: Tensor | None = None
    mass_squared: Tensor | None = None
    coverage: Tensor | None = None
    change: Tensor | None = None
    dominant: Tensor | None = None
    alpha: float = 0.0


@triton.jit(do_not_specialize=["n_tokens", "n_queries", "group", "heads"])
def _score_tokens(
    QUERY, KEYS, VALUES, CENTRE, VISIBLE, WEIGHTS, LARGEST, TOTAL, OUTPUT, NORM, FIRST_TILE, END_TILE,
    MASS, MASS_SQUARED, COVERAGE, CHANGE, DOMINANT_UNIT,
    scale, ceiling, double_alpha, n_tokens, n_queries, group, heads,
    query_head, query_group, query_token, key_head, key_token, value_head, value_token,
    KEY_DIM: tl.constexpr, KEY_DIM_PADDED: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_DIM_PADDED: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
    MAXIMUM: tl.constexpr, WEIGH_REST: tl.constexpr, DOMINANT_MASS: tl.constexpr, LEAST_REST: tl.constexpr,
):  # fmt: skip
    """One tile of tokens against all queries of `heads` query heads.

    OUTPUT [S, G * Q, Dv] in the dtype of the values, NORM [S, G * Q] its squared length; FIRST_TILE, END_TILE
    [token tiles]: the tiles of queries that see anything of a tile of tokens, None: all.
    """
    head = tl.program_id(1).to(tl.int64)
    first_head = tl.program_id(2) * heads
    token_lane = tl.arange(0, TOKENS)
    key_lane, value_lane, query_lane = (
        tl.arange(0, KEY_DIM_PADDED),
        tl.arange(0, VALUE_DIM_PADDED),
        tl.arange(0, QUERIES),
    )
    first_token = tl.program_id(0) * TOKENS
    token = first_token + token_lane
    stored = token < n_tokens
    keys = KEYS + head * key_head + first_token.to(tl.int64) * key_token
    key = tl.load(
        keys + token_lane[:, None] * key_token + key_lane[None, :],
        mask=stored[:, None] & (key_lane < KEY_DIM)[None, :],
        other=0.0,
    )
    if UPCAST:
        key = key.to(tl.float32)
    if CHANGE is not None:
        values = VALUES + head * value_head + first_token.to(tl.int64) * value_token
        value = tl.load(
            values + token_lane[:, None] * value_token + value_lane[None, :],
            mask=stored[:, None] & (value_lane < VALUE_DIM)[None, :],
            other=0.0,
        )
        centre = tl.load(CENTRE + head * VALUE_DIM + value_lane, mask=value_lane < VALUE_DIM, other=0.0)
        value = value.to(tl.float32) - centre[None, :]
        if not UPCAST:
            value = value.to(VALUES.dtype.element_ty)
        value_norm = tl.sum(value.to(tl.float32) * value.to(tl.float32), 1)
        change = tl.zeros([TOKENS], tl.float32)
    mass = tl.zeros([TOKENS], tl.float32)
    mass_squared = tl.zeros([TOKENS], tl.float32)
    coverage = tl.zeros([TOKENS], tl.float32)

    first_tile, end_tile = 0, tl.cdiv(n_queries, QUERIES)
    if FIRST_TILE is not None:
        first_tile = tl.load(FIRST_TILE + tl.program_id(0))
        end_tile = tl.load(END_TILE + tl.program_id(0))
    tiles = tl.maximum(end_tile - first_tile, 0)
    # one flat loop over heads and tiles of queries keeps the loads of a short window in the software pipeline
    for step in tl.range(0, heads * tiles, 1, num_stages=STAGES):
        query_head_index = first_head + step // tiles
        tile = first_tile + step % tiles
        query_index = tile * QUERIES + query_lane
        real = query_index < n_queries
        rows = QUERY + head * query_head + tl.cast(query_head_index, tl.int64) * query_group
        rows += tl.cast(tile * QUERIES, tl.int64) * query_token
        visible = tl.load(VISIBLE + query_index, mask=real, other=0)
        query = tl.load(
            rows + query_lane[None, :] * query_token + key_lane[:, None],
            mask=real[None, :] & (key_lane < KEY_DIM)[:, None],
            other=0.0,
        )
        if UPCAST:
            query = query.to(tl.float32)
        row = (head * group + query_head_index) * n_queries + query_index
        largest = tl.load(LARGEST + row, mask=real, other=0.0)
        total = tl.load(TOTAL + row, mask=real, other=0.0)
        scaling = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
        weight = tl.load(WEIGHTS + query_index, mask=real, other=0.0)

        logits = logits_log2(tl.dot(key, query, input_precision="ieee"), scale, ceiling, SOFTCAP)
        seen = token[:, None] < visible[None, :]
        # a row's largest logit was found by another kernel: rounding must not make a share exceed 1
        share = tl.where(seen, tl.minimum(tl.exp2(logits - largest[None, :]) * scaling[None, :], 1.0), 0.0)
        fresh = tl.where(tile == first_tile, 0.0, 1.0)
        done = tl.where(tile == end_tile - 1, token, n_tokens) < n_tokens
        at = (head * group + query_head_index) * n_tokens + token
        if MASS is not None:
            mass = _reduced(mass * fresh, share, weight, MAXIMUM)
            tl.store(MASS + at, mass, mask=done)
        if MASS_SQUARED is not None:
            mass_squared = _reduced(mass_squared * fresh, share * share, weight, MAXIMUM)
            tl.store(MASS_SQUARED + at, mass_squared, mask=done)
        if COVERAGE is not None:
            uniform = 1.0 / tl.maximum(visible, 1).to(tl.float32) * (1.0 + 1e-6)
            covered = (seen & (share > uniform[None, :])).to(tl.float32)
            coverage = _reduced(coverage * fresh, covered, weight, MAXIMUM)
            tl.store(COVERAGE + at, coverage, mask=done)
        if CHANGE is not None:
            output = tl.load(
                OUTPUT + row[None, :] * VALUE_DIM + value_lane[:, None],
                mask=real[None, :] & (value_lane < VALUE_DIM)[:, None],
                other=0.0,
            )
            if UPCAST:
                output = output.to(tl.float32)
            norm = tl.load(NORM + row, mask=real, other=0.0)
            distance = norm[None, :] - 2.0 * tl.dot(value, output, input_precision="ieee") + value_norm[:, None]
            moved = share * share * tl.maximum(distance, 0.0)
            if WEIGH_REST:
                moved *= tl.exp2(-double_alpha * tl.log2(tl.maximum(1.0 - share, LEAST_REST)))
            heavy = share > DOMINANT_MASS
            heaviest = tl.max(tl.where(heavy, token[:, None], -1), 0)  # at most one token of a row is heavy
            tl.store(DOMINANT_UNIT + row, heaviest, mask=heaviest >= 0)
            change = _reduced(change * fresh, tl.where(heavy, 0.0, moved), weight, MAXIMUM)
            tl.store(CHANGE + at, change, mask=done)


@triton.jit
def _reduced(so_far, statistic, weight, MAXIMUM: tl.constexpr):
    """A statistic [tokens, queries] joined to what earlier queries gave [tokens]."""
    if MAXIMUM:
        return tl.maximum(so_far, tl.max(statistic, 1))
    return so_far + tl.sum(statistic * weight[None, :], 1)


def score_tokens(
    problem: Problem, attended: Attended, weights: Tensor, outputs: Outputs, reducer: str, *, skip_hidden: bool = False
) -> None:
    """Fill `outputs`. skip_hidden: leave out tiles of queries that see nothing of a tile of tokens (many queries)."""
    n_heads, group, n_queries, key_dim = problem.query.shape
    n_tokens, value_dim = problem.keys.shape[1], problem.value_dim
    tokens, queries, warps, stages = launch_sizes(
        architecture(problem.query.device),
        max(key_dim, 0 if outputs.change is None else value_dim),
        problem.keys.element_size(),
        n_queries,
    )
    output = norm = first = end = None
    if outputs.change is not None:
        assert attended.output is not None
        assert problem.values is not None
        # the dot product rounds the output; its norm has to be that of the rounded one, so that squares stay squares
        output = attended.output.to(problem.values.dtype)
        norm = output.float().square().sum(-1)
    if skip_hidden:
        first, end = query_tiles(problem.visible, n_tokens, tokens, queries)
    heads = 1 if skip_hidden else group
    grid = (triton.cdiv(n_tokens, tokens), n_heads, triton.cdiv(group, heads))
    _score_tokens[grid](
        problem.query, problem.keys, None if output is None else problem.values, problem.centre, problem.visible, weights,
        attended.largest, attended.total, output, norm, first, end,
        outputs.mass, outputs.mass_squared, outputs.coverage, outputs.change, outputs.dominant,
        *problem.logit_factors(), 2.0 * outputs.alpha, n_tokens, n_queries, group, heads, *problem.strides(),
        **problem.dims(), QUERIES=queries, TOKENS=tokens, STAGES=stages, MAXIMUM=reducer == "max",
        WEIGH_REST=outputs.alpha != 0, DOMINANT_MASS=DOMINANT, LEAST_REST=MIN_REST,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def query_tiles(visible: Tensor, n_tokens: int, tokens: int, queries: int) -> tuple[Tensor, Tensor]:
    """First tile of queries, and one past the last, that sees anything of each tile of tokens, int32.

    Where positions of queries ascend, these are exactly the tiles that see something; in any other order a tile in
    between may see nothing, and adds nothing.
    """
    n_tiles = triton.cdiv(visible.numel(), queries)
    padding = n_tiles * queries - visible.numel()
    reach = torch.nn.functional.pad(visible, (0, padding)).view(n_tiles, queries).amax(1)  # tokens that a tile sees
    starts = torch.arange(0, n_tokens, tokens, device=visible.device, dtype=visible.dtype)
    first = torch.searchsorted(reach.cummax(0).values, starts, right=True)
    end = n_tiles - torch.searchsorted(reach.flip(0).cummax(0).values, starts, right=True)
    return first.to(torch.int32), end.to(torch.int32)


def launch_sizes(arch: str, dim: int, itemsize: int, n_queries: int) -> tuple[int, int, int, int]:
    """(tokens of a tile, queries of a tile, warps, stages) of the second pass."""
    device, queries = device_class(arch), min(64, padded(n_queries))
    if device == "interpreter":
        return 32, 16, 4, 2
    if device == "amd":
        return 64, min(32, queries), 4, 1
    if itemsize == 4 and dim > 128:
        return 32, 16, 8, 2
    if itemsize == 4 or dim > 128:
        return 64, min(32, queries), 8, 2
    return 128, queries, 8, (3 if device == "hopper" else 2)


def compile_cases(arch: str, modes: Collection[str] = ("change",)) -> list[CompileCase]:
    """The second pass over tokens; "all" adds mass, its square and coverage, "many" skips hidden tiles."""
    cases = []
    for dim, dtype, n_queries, mode in (
        *((dim, "bf16", 64, "change") for dim in (64, 128)),
        (80, "bf16", 32, "change all"), (256, "bf16", 64, "change all max softcap"),
        (128, "fp16", 64, "change all"), (128, "fp32", 64, "change all"),
        (64, "bf16", 64, "mass many"), (128, "bf16", 64, "mass many"), (256, "bf16", 64, "mass many softcap"),
    ):  # fmt: skip
        if mode.split()[0] not in modes:
            continue
        values = "change" in mode
        tokens, queries, warps, stages = launch_sizes(arch, dim, 4 if dtype == "fp32" else 2, n_queries)
        types = {**shared_types(dtype, values), "WEIGHTS": "*fp32", "double_alpha": "fp32"}
        types |= dict.fromkeys(("n_tokens", "group", "heads"), "i32")
        constants = {
            **shared_constants(dim, values, "softcap" in mode), "QUERIES": queries, "TOKENS": tokens, "STAGES": stages,
            "MAXIMUM": "max" in mode, "WEIGH_REST": values, "DOMINANT_MASS": DOMINANT, "LEAST_REST": MIN_REST,
        }  # fmt: skip
        optional(types, constants, values, f"*{dtype}", "OUTPUT")
        optional(types, constants, values, "*fp32", "NORM", "CHANGE")
        optional(types, constants, values, "*i32", "DOMINANT_UNIT")
        optional(types, constants, "many" in mode, "*i32", "FIRST_TILE", "END_TILE")
        optional(types, constants, "all" in mode, "*fp32", "MASS_SQUARED", "COVERAGE")
        optional(types, constants, "mass" in mode or "all" in mode, "*fp32", "MASS")
        label = f"D{dim} Q{queries} {dtype} {mode}"
        cases.append(CompileCase("window_tokens", label, _score_tokens, types, constants, warps, stages, ALIGNED))
    return cases
