"""Attention mass that every token receives from all queries of a prompt: see `reference/cumulative_mass.py`.

Two passes like the keys' half of attention's backward pass: softmax statistics of every query, then column sums, one
program per tile of tokens and query head over the tiles of queries that see it. Memory is linear in queries and tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress_kernels import window_attention, window_tokens
from kvpress_kernels.launch import CompileCase, check_device, check_dtype
from kvpress_kernels.window_attention import attend
from kvpress_kernels.window_problem import Problem
from kvpress_kernels.window_scores import visible_tokens
from kvpress_kernels.window_tokens import Outputs, score_tokens


def cumulative_mass(
    query: Tensor,
    keys: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    debias: bool = False,
) -> Tensor:
    """Column sums of causal attention, per query head: [S, G, N] float32.

    Arguments and result as in `reference.cumulative_mass`; bfloat16, float16 and float32, keys with any strides but
    the last. Raises ValueError for other dtypes and for shapes that do not fit.
    """
    _check(query, keys, query_positions, key_positions, sinks)
    n_heads, group, n_queries, _ = query.shape
    mass = torch.zeros((n_heads, group, keys.shape[1]), device=keys.device)
    if mass.numel() == 0 or n_queries == 0:
        return mass
    visible = visible_tokens(query_positions, key_positions)
    problem = Problem(
        query if query.stride(-1) == 1 else query.contiguous(), keys, None, None, visible, scale, softcap,
        None if sinks is None else sinks.to(torch.float32).contiguous(),
    )  # fmt: skip
    weights = torch.ones(n_queries, device=keys.device)
    score_tokens(problem, attend(problem), weights, Outputs(mass=mass), "sum", skip_hidden=True)
    if debias:
        mass /= _viewers(visible, keys.shape[1]).clamp(min=1)
    return mass


def _viewers(visible: Tensor, n_tokens: int) -> Tensor:
    """[N] number of queries that see each token: those that see more tokens than lie before it."""
    tokens = torch.arange(n_tokens, device=visible.device, dtype=visible.dtype)
    return visible.numel() - torch.searchsorted(visible.sort().values, tokens, right=True)


def _check(query: Tensor, keys: Tensor, query_positions: Tensor, key_positions: Tensor, sinks: Tensor | None) -> None:
    """Raise ValueError, in one sentence, where tensors do not fit together."""
    check_device(query, keys, query_positions, key_positions, sinks)
    for name, tensor in (("query", query), ("keys", keys)):
        check_dtype(tensor, name)
    if query.dtype != keys.dtype:
        raise ValueError(f"query and keys must have one dtype, got {query.dtype} and {keys.dtype}")
    if query.dim() != 4 or keys.dim() != 3 or keys.shape[::2] != (query.shape[0], query.shape[3]):
        raise ValueError(f"query [S, G, Q, D] and keys [S, N, D] do not fit: {tuple(query.shape)}, {tuple(keys.shape)}")
    if keys.stride(2) != 1:
        raise ValueError("the last dimension of keys must be contiguous")
    if query_positions.shape != (query.shape[2],) or key_positions.shape != (keys.shape[1],):
        raise ValueError(
            f"positions must hold one entry for each of {query.shape[2]} queries and {keys.shape[1]} tokens"
        )
    if sinks is not None and sinks.shape != query.shape[:2]:
        raise ValueError(f"sinks must be {list(query.shape[:2])}, got {tuple(sinks.shape)}")


def compile_cases(arch: str) -> list[CompileCase]:
    """Both passes without values."""
    return [*window_attention.compile_cases(arch, ["mass"]), *window_tokens.compile_cases(arch, ["mass"])]
