"""Scores of a prompt's tokens from its last queries, one layer at a time over the layers of a model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kvpress_kernels.bench.measurement import Measurement, Prepared
from kvpress_kernels.bench.shapes import Scale, normal


def measurements(scale: Scale, device: torch.device) -> Iterator[Measurement]:
    n_tokens = scale.contexts[-1] * scale.k_tokens
    for window in (32, 64):
        queries = window if scale.k_tokens > 100 else window // 8
        for statistics in (("mass",), ("change@1",)):
            changes = statistics != ("mass",)
            key_bytes = scale.n_kv_heads * n_tokens * scale.dim * scale.dtype.itemsize
            query_bytes = scale.n_kv_heads * scale.group * queries * scale.dim * scale.dtype.itemsize
            scores = 4 * scale.n_kv_heads * scale.group * n_tokens
            nbytes = (4 if changes else 2) * key_bytes + 2 * query_bytes + scores  # K (and V) in both passes
            products = 4 if changes else 2  # of queries with keys or values
            floating = products * 2 * scale.n_kv_heads * scale.group * queries * n_tokens * scale.dim
            setting = {"tokens": n_tokens, "queries": queries, "statistics": statistics[0]}
            prepare = partial(_prepare, scale=scale, n_tokens=n_tokens, queries=queries, statistics=statistics)
            yield Measurement(
                "window_scores", setting, prepare, nbytes, floating, sets=scale.layers, repeated=scale.layers
            )


def _prepare(
    device: torch.device, seed: int, *, scale: Scale, n_tokens: int, queries: int, statistics: tuple[str, ...]
) -> Prepared:
    from kvpress_kernels.window_scores import window_scores

    heads = scale.n_kv_heads
    query = normal((heads, scale.group, queries, scale.dim), scale.dtype, device, seed)
    keys, values = (normal((heads, n_tokens, scale.dim), scale.dtype, device, seed + i) for i in (1, 2))
    positions = torch.arange(n_tokens, device=device)
    weights = torch.ones(queries, device=device)

    def launch() -> object:
        return window_scores(
            query, keys, values, positions[-queries:], positions, weights, scale=scale.dim**-0.5, statistics=statistics
        )

    return Prepared(launch)
