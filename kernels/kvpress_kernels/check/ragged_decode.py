"""Cases of decode attention over pages: lengths, dtypes, shapes, options, logits of all sizes, far pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpress_kernels.check.cases import (
    LARGE_LOGIT,
    LARGE_LOGIT_ERROR,
    LOG_SUM,
    RELATIVE,
    Case,
    Results,
    Trial,
    difference,
    stored_half,
)
from kvpress_kernels.check.inputs import Size, Stored, normal, stored
from kvpress_kernels.launch import INTERPRETED
from kvpress_kernels.pages import PageLayout, n_pages


def cases(size: Size) -> Iterator[Case]:
    dim, page, group = size.dims[0], size.page_sizes[0], size.groups[0]
    for dtype in size.dtypes:
        name = str(dtype).removeprefix("torch.")
        shapes: dict[str, tuple[PageLayout, int]] = {}
        for other in size.dims:
            shapes[f"D{other} P{page} G{group}"] = PageLayout(page, other, other, dtype), group
        for other in size.page_sizes[1:]:
            shapes[f"D{dim} P{other} G{group}"] = PageLayout(other, dim, dim, dtype), group
        for other in size.groups[1:]:
            shapes[f"D{dim} P{page} G{other}"] = PageLayout(page, dim, dim, dtype), other
        shapes[f"D{dim}/{dim // 2} P{page} G{group}"] = PageLayout(page, dim, dim // 2, dtype), group
        for label, (layout, heads) in shapes.items():
            make = partial(_trial, size=size, layout=layout, dtype=dtype, group=heads, statistics="values")
            yield Case("ragged_decode", f"{name} {label}", make)
        layout = PageLayout(page, dim, dim, dtype)
        options: dict[str, dict[str, Any]] = {
            "no statistics": {"statistics": "none"},
            "page lse": {"statistics": "lse"},
            "balanced": {"statistics": "values", "balanced": True},
            "sinks": {"statistics": "values", "sinks": True},
            "softcap": {"statistics": "values", "softcap": 5.0},
            "sinks, softcap, balanced": {"sinks": True, "softcap": 5.0, "balanced": True},
            "logits of 80": {"statistics": "values", "logits": "large"},
            "equal logits": {"statistics": "values", "logits": "equal"},
            "equal lengths": {"counts": [page * 2 + 5] * 2 * size.n_kv_heads},
            "int8": {"stored": torch.int8},
            "int8 statistics": {"statistics": "values", "stored": torch.int8},
            "int8 sinks, softcap, balanced": {"sinks": True, "softcap": 5.0, "balanced": True, "stored": torch.int8},
            "int8 logits of 80": {"logits": "large", "stored": torch.int8},
        }
        if size.name == "full":
            options["8,192 tokens a row"] = {"counts": [8192] * size.n_kv_heads}
            options["int8 8,192 tokens a row"] = options["8,192 tokens a row"] | {"stored": torch.int8}
            options["pages 2^31 elements apart"] = {"far": True}
        for label, changes in options.items():
            of = replace(layout, dtype=changes.pop("stored", dtype))
            make = partial(_trial, size=size, layout=of, dtype=dtype, group=group, **changes)
            yield Case("ragged_decode", f"{name} {label}", make)


def _trial(
    device: torch.device,
    *,
    size: Size,
    layout: PageLayout,
    dtype: torch.dtype,
    group: int,
    counts: Sequence[int] | None = None,
    statistics: str = "none",
    softcap: float | None = None,
    sinks: bool = False,
    logits: str = "usual",
    balanced: bool = False,
    far: bool = False,
) -> Trial:
    from kvpress_kernels import ragged_decode as kernel
    from kvpress_kernels import work_list
    from kvpress_kernels.reference import ragged_decode as reference

    counts = size.lengths(layout.page_size) if counts is None else counts
    held = stored(device, layout, counts, far=far)
    shape = (held.rows // size.n_kv_heads, size.n_kv_heads, group, layout.key_dim)
    query = normal(shape, dtype, device, seed=1, size=0.0 if logits == "equal" else 1.0)
    scale = layout.key_dim**-0.5 if logits != "large" else LARGE_LOGIT / _largest_logit(query, held)
    sink_logits = normal((size.n_kv_heads * group,), torch.float32, device, seed=2) if sinks else None
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "statistics": statistics}
    work = None
    if balanced:
        work = work_list.work_list(held.lengths, layout.page_size, held.n_columns, 2)

    def run() -> Results:
        found = kernel.ragged_decode(
            query, held.pages, held.page_table, held.lengths, sinks=sink_logits, work=work, **options
        )
        return _defined(found, held)

    def expected() -> Results:
        wide_sinks = None if sink_logits is None else sink_logits.double()
        found = reference.ragged_decode(
            query.double(), held.pages, held.page_table, held.lengths, sinks=wide_sinks, **options
        )
        return _defined(found, held)

    least = LARGE_LOGIT_ERROR if logits == "large" else 0.0
    allowed = {
        "output": max(stored_half(dtype), least),
        "output_wide": max(RELATIVE[dtype], least),
        "lse": max(LOG_SUM[dtype], 2 * least),
    }
    if statistics != "none":
        allowed["page_lse"] = allowed["lse"]
    if statistics == "values":
        allowed["page_values"] = allowed["output"]
    exact = not layout.is_int8 and not (INTERPRETED and dtype != torch.float32)
    plain = len(set(counts)) == 1 and softcap is None and not sinks and exact
    if not plain:
        return Trial(run, expected, allowed, frozenset({"lse", "page_lse"}))
    peers = partial(_torch_errors, query, held, scale)
    return Trial(run, expected, allowed, frozenset({"lse", "page_lse"}), peers)


def _defined(found: Any, held: Stored) -> Results:
    """Results by name, of pages only those that hold tokens."""
    pages = torch.arange(held.n_columns, device=held.lengths.device)
    used = pages < n_pages(held.lengths, held.pages.layout.page_size)[:, None]
    results = {"output": found.output, "output_wide": found.output_wide, "lse": found.lse}
    if found.page_lse is not None:
        results["page_lse"] = found.page_lse[used]
    if found.page_values is not None:
        results["page_values"] = found.page_values[used]
    return results


def _largest_logit(query: Tensor, held: Stored) -> float:
    """The largest |q k| of the rows, without the scale."""
    row, _ = held.slots()
    per_row = query.double().flatten(0, 1)  # [R, G, Dk]
    logits = (per_row[row] * held.read().keys.double()[:, None]).sum(-1)
    return float(logits.abs().max())


def _torch_errors(query: Tensor, held: Stored, scale: float, expected: Results) -> Mapping[str, float]:
    """Error of torch's own attention on the same numbers, rows of equal length."""
    batch, n_kv_heads, group, dim = query.shape
    stored_tokens = held.read()
    keys, values = (part.view(batch, n_kv_heads, held.counts[0], -1) for part in stored_tokens[:2])
    heads = query.reshape(batch, n_kv_heads * group, 1, dim)
    output = F.scaled_dot_product_attention(heads, keys, values, scale=scale, enable_gqa=True)
    return {"output": difference(output.view(batch, n_kv_heads, group, -1), expected["output"])}
