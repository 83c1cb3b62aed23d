"""Evidence of a set of proxy queries on a GPU: see `reference/window_scores.py`, whose results these are.

Two passes over the keys, and over the values where output change is asked for (`window_attention`, then
`window_tokens` or `window_units`). A third pass attends again, without that unit, for the queries of which one unit
holds nearly all mass; where there is none its programs end at once. Nothing of size queries x tokens reaches memory,
and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvpress_kernels import window_attention, window_tokens, window_units
from kvpress_kernels.launch import CompileCase, check_device, check_dtype
from kvpress_kernels.window_attention import Attended, attend
from kvpress_kernels.window_problem import Problem
from kvpress_kernels.window_tokens import Outputs, score_tokens
from kvpress_kernels.window_units import score_units

#: tokens of which the centre of the values is taken; any centre gives the same results, up to rounding
CENTRE_TOKENS = 4096
#: elements of the attention outputs of one look at the queries (256 MiB in float32)
OUTPUT_ELEMENTS = 1 << 26
#: queries from which on it pays to look up what sees what
MANY_QUERIES = 512


def window_scores(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    weights: Tensor,
    *,
    scale: float,
    statistics: Collection[str],
    unit_slots: Tensor | None = None,
    reducer: str = "sum",
    softcap: float | None = None,
    sinks: Tensor | None = None,
    value_basis: Tensor | None = None,
) -> dict[str, Tensor]:
    """Statistics of every unit, reduced over the queries: name -> [S, G, U] float32.

    Arguments and results as in `reference.window_scores`; bfloat16, float16 and float32, keys and values with any
    strides but the last. No token may be in two units. Each `change` statistic beyond the first costs another second
    pass. Products of half precision inputs are rounded as in flash attention.

    Raises ValueError for other dtypes, shapes that do not fit, an unknown statistic or reducer.
    """
    _check(query, keys, values, query_positions, key_positions, weights, unit_slots, sinks, value_basis)
    plain, alphas = _split(statistics)
    if reducer not in ("sum", "max"):
        raise ValueError(f"reducer must be 'sum' or 'max', got '{reducer}'")
    n_heads, group, n_queries, _ = query.shape
    n_units = keys.shape[1] if unit_slots is None else unit_slots.shape[0]
    found = torch.zeros((len(plain) + len(alphas), n_heads, group, n_units), device=keys.device)
    result = dict(zip([*plain, *alphas], found.unbind(0), strict=True))
    if found.numel() == 0 or n_queries == 0 or keys.shape[1] == 0:
        return result
    weights = weights.to(torch.float32)
    problem = Problem(
        query if query.stride(-1) == 1 else query.contiguous(),
        keys,
        values if alphas else None,
        _centre(values) if alphas else None,
        visible_tokens(query_positions, key_positions, weights),
        scale,
        softcap,
        None if sinks is None else sinks.to(torch.float32).contiguous(),
    )
    slots = None if unit_slots is None else unit_slots.to(torch.int32).contiguous()
    # outputs of all queries are in memory at a time
    step = max(1, OUTPUT_ELEMENTS // (n_heads * group * values.shape[2])) if alphas else n_queries
    for first in range(0, n_queries, step):
        part = found if first == 0 else torch.zeros_like(found)
        chunk = slice(first, first + step)
        some = replace(problem, query=problem.query[:, :, chunk], visible=problem.visible[chunk])
        _fill(some, weights[chunk], slots, part, plain, alphas, reducer, value_basis)
        if first and reducer == "max":
            torch.maximum(found, part, out=found)
        elif first:
            found += part
    return result


def _fill(
    problem: Problem,
    weights: Tensor,
    slots: Tensor | None,
    found: Tensor,
    plain: Sequence[str],
    alphas: dict[str, float],
    reducer: str,
    value_basis: Tensor | None,
) -> None:
    """Write the statistics into zeros [statistics, S, G, U], the plain ones first."""
    if value_basis is not None and alphas:
        for head in range(problem.keys.shape[0]):  # values differ: each query head becomes a KV head of its own
            _fill(
                _in_basis(problem, head, value_basis[head]), weights, slots, found[:, head][:, :, None],
                plain, alphas, reducer, None,
            )  # fmt: skip
        return
    result = dict(zip([*plain, *alphas], found.unbind(0), strict=True))
    attended = attend(problem)
    dominant = None
    if alphas:
        dominant = torch.full(attended.total.shape, -1, dtype=torch.int32, device=weights.device)
    first = Outputs(result.get("mass"), result.get("mass_squared"), result.get("coverage"))
    for outputs in [
        replace(first if i == 0 else Outputs(), change=result[name], dominant=dominant, alpha=alpha)
        for i, (name, alpha) in enumerate(alphas.items())
    ] or [first]:
        if slots is None:
            score_tokens(problem, attended, weights, outputs, reducer, skip_hidden=weights.numel() >= MANY_QUERIES)
        else:
            score_units(problem, attended, weights, slots, outputs, reducer)
    if dominant is not None:
        rest = attend(problem, dominant, None if slots is None else _unit_of(slots, problem.keys.shape[1]))
        for name, alpha in alphas.items():
            _add_dominant(result[name], dominant, attended, rest, weights, alpha, reducer)


def _add_dominant(
    change: Tensor, dominant: Tensor, attended: Attended, rest: Attended, weights: Tensor, alpha: float, reducer: str
) -> None:
    """Add the change of units that hold nearly all mass, |o - o_rest|^2 (1 - a)^(2 - 2 alpha), to change [S, G, U].

    Both factors come from attention over the rest, so that they keep their digits however small 1 - a is.
    """
    assert attended.output is not None
    assert rest.output is not None
    left = torch.exp2(rest.largest - attended.largest) * rest.total / attended.total
    distance = (attended.output - rest.output).square().sum(-1)
    moved = torch.where((dominant >= 0) & (rest.total > 0), distance * left.pow(2 - 2 * alpha), 0.0)  # [S, G, Q]
    unit = dominant.clamp(min=0).long()  # rows without one add 0 to the first unit
    if reducer == "max":
        change.scatter_reduce_(2, unit, moved, "amax")
        return
    rows = torch.arange(change.shape[0] * change.shape[1], device=change.device).view(*change.shape[:2], 1)
    flat = (rows * change.shape[2] + unit).flatten()  # index_put sorts its indices: the sum has one order
    change.view(-1).index_put_((flat,), (moved * weights).flatten(), accumulate=True)


def visible_tokens(query_positions: Tensor, key_positions: Tensor, weights: Tensor | None = None) -> Tensor:
    """[Q] int32 number of tokens that each query sees, the first ones as positions ascend; 0 where its weight is 0."""
    visible = torch.searchsorted(key_positions.contiguous(), query_positions.to(key_positions.dtype), right=True)
    if weights is not None:
        visible = torch.where(weights > 0, visible, 0)
    return visible.to(torch.int32)


def _centre(values: Tensor) -> Tensor:
    """About the mean of the values, [S, Dv] float32."""
    step = max(1, values.shape[1] // CENTRE_TOKENS)
    return values[:, ::step].mean(1, dtype=torch.float32)


def _in_basis(problem: Problem, head: int, basis: Tensor) -> Problem:
    """KV head `head` as G heads with one query head each, whose values are multiplied by basis [G, Dv, R]."""
    assert problem.values is not None
    group = basis.shape[0]
    values = problem.values[head]
    transformed = (values.float() @ basis.float()).to(values.dtype)  # [G, N, R]
    return replace(
        problem,
        query=problem.query[head][:, None],
        keys=problem.keys[head].expand(group, -1, -1),  # a view of stride 0
        values=transformed,
        centre=_centre(transformed),
        sinks=None if problem.sinks is None else problem.sinks[head][:, None].contiguous(),
    )


def _unit_of(slots: Tensor, n_tokens: int) -> Tensor:
    """[N] int32 unit of each token, -1 where it belongs to none."""
    unit_of = torch.full((n_tokens + 1,), -1, dtype=torch.int32, device=slots.device)  # the last one takes the gaps
    units = torch.arange(slots.shape[0], dtype=torch.int32, device=slots.device)[:, None].expand_as(slots)
    unit_of.scatter_(0, torch.where(slots >= 0, slots, n_tokens).long().flatten(), units.flatten())
    return unit_of[:n_tokens]


def _split(statistics: Collection[str]) -> tuple[list[str], dict[str, float]]:
    """Statistics of the mass, and exponent of each change statistic by its name."""
    plain, alphas = [], dict[str, float]()
    for name in statistics:
        if name in ("mass", "mass_squared", "coverage"):
            plain.append(name)
        elif name.startswith("change@"):
            alphas[name] = float(name.removeprefix("change@"))
        else:
            raise ValueError(f"unknown statistic '{name}'; known are mass, mass_squared, coverage and change@alpha")
    return plain, alphas


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    weights: Tensor,
    unit_slots: Tensor | None,
    sinks: Tensor | None,
    value_basis: Tensor | None,
) -> None:
    """Raise ValueError, in one sentence, where tensors do not fit together."""
    check_device(query, keys, values, query_positions, key_positions, weights, unit_slots, sinks, value_basis)
    for name, tensor in (("query", query), ("keys", keys), ("values", values)):
        check_dtype(tensor, name)
    if query.dtype != keys.dtype:
        raise ValueError(f"query and keys must have one dtype, got {query.dtype} and {keys.dtype}")
    if query.dim() != 4 or keys.dim() != 3 or values.dim() != 3:
        raise ValueError("query must be [S, G, Q, D], keys and values [S, N, D] and [S, N, Dv]")
    n_heads, group, n_queries, key_dim = query.shape
    if keys.shape[0] != n_heads or keys.shape[2] != key_dim or values.shape[:2] != keys.shape[:2]:
        raise ValueError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit query {tuple(query.shape)}"
        )
    if keys.stride(2) != 1 or values.stride(2) != 1:
        raise ValueError("the last dimension of keys and values must be contiguous")
    if query_positions.shape != (n_queries,) or weights.shape != (n_queries,):
        raise ValueError(f"query_positions and weights must hold one entry for each of {n_queries} queries")
    if key_positions.shape != (keys.shape[1],):
        raise ValueError(f"key_positions must hold one entry for each of {keys.shape[1]} tokens")
    if unit_slots is not None and unit_slots.dim() != 2:
        raise ValueError("unit_slots must be [U, P]")
    if sinks is not None and sinks.shape != (n_heads, group):
        raise ValueError(f"sinks must be [{n_heads}, {group}], got {tuple(sinks.shape)}")
    if value_basis is not None and (
        value_basis.dim() != 4 or value_basis.shape[:3] != (n_heads, group, values.shape[2])
    ):
        raise ValueError(
            f"value_basis must be [{n_heads}, {group}, {values.shape[2]}, R], got {tuple(value_basis.shape)}"
        )


def compile_cases(arch: str) -> list[CompileCase]:
    """Every configuration of the three kernels in this op."""
    return [
        *window_attention.compile_cases(arch),
        *window_tokens.compile_cases(arch),
        *window_units.compile_cases(arch),
    ]
