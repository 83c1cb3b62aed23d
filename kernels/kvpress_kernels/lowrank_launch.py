"""How a low-rank decode step is launched: what its operands must be, and the configurations that are compiled ahead of time.

Warps, stages and splits are those of `decode_launch` for pages of the largest ranks, save that a query in two parts
leaves registers for fewer heads a program. No time has been measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvpress_kernels import decode_launch, lowrank_project
from kvpress_kernels.decode_launch import CODE_BYTES, Launch, in_units
from kvpress_kernels.launch import CompileCase, check_device, check_dtype, padded
from kvpress_kernels.page_store import POINTER_TYPES, check_pages, query_dtype
from kvpress_kernels.pages import PageLayout, Pages
from kvpress_kernels.reference.work_list import WorkList

#: ranks are multiples of this, so that every token of every float dtype starts at a multiple of 16 bytes
RANK_STEP = 8
#: the same for codes
CODE_RANK_STEP = 16


def launch_options(arch: str, largest: PageLayout, group: int) -> Launch:
    """Launch for pages of these largest ranks on an architecture ("sm_90", "gfx942")."""
    launch = decode_launch.launch_options(arch, largest, group)
    return launch._replace(heads=16) if padded(largest.key_dim) > 64 else launch


def constants(
    largest: PageLayout,
    group: int,
    launch: Launch,
    *,
    dtype: torch.dtype,
    rank_step: int,
    softcap: bool,
    balanced: bool,
    upcast: bool,
) -> dict[str, Any]:
    """Constexpr arguments of the kernel. largest: a page of the largest ranks; dtype: of the reduced query."""
    return {
        "GROUP": group,
        "HEADS": launch.heads,
        "RK": largest.key_dim,
        "RK_PADDED": padded(largest.key_dim),
        "RV": largest.value_dim,
        "RV_PADDED": padded(largest.value_dim),
        "PAGE": largest.page_size,
        "CODES": largest.is_int8,
        "RANK_STEP": rank_step,
        "IN_UNITS": in_units(largest, dtype),
        "SOFTCAP": softcap,
        "BALANCED": balanced,
        "UPCAST": upcast,
        "STAGES": launch.num_stages,
    }


def rank_step(pages: Sequence[Pages]) -> int:
    """What all ranks are multiples of, as far as loads can use it: tokens of other codes start at multiples of 8 bytes."""
    wide = all(rank % CODE_RANK_STEP == 0 for part in pages for rank in (part.layout.key_dim, part.layout.value_dim))
    return CODE_RANK_STEP if pages[0].layout.is_int8 and wide else RANK_STEP


def check(
    query: Tensor,
    pages: Sequence[Pages],
    page_table: Tensor,
    lengths: Tensor,
    ranks: Tensor,
    key_bases: Tensor,
    value_bases: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    lost: Tensor | None,
    work: WorkList | None,
) -> None:
    """Raise ValueError, in one sentence, where the operands do not fit together."""
    if query.dim() != 4:
        raise ValueError(f"query must be [B, H, G, D], got {tuple(query.shape)}")
    batch, n_kv_heads, group, dim = query.shape
    check_dtype(query, "query")
    value_dim = value_bases.shape[1] if value_bases.dim() == 3 else 0
    check_reduced(pages, page_table, lengths, ranks, key_bases, value_bases, batch, n_kv_heads, (dim, value_dim))
    check_device(
        query, pages[0].anchor, page_table, lengths, ranks, key_bases, value_bases, sinks, lost,
        *(() if work is None else work[:3]),
    )  # fmt: skip
    if scale <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"scale and softcap must be positive, got {scale} and {softcap}")
    if sinks is not None and sinks.numel() != n_kv_heads * group:
        raise ValueError(f"sinks must hold {n_kv_heads * group} logits, one per query head, got {sinks.numel()}")
    if lost is not None and lost.shape != (n_kv_heads, value_dim):
        raise ValueError(f"lost must be [{n_kv_heads}, {value_dim}] as the values are, got {tuple(lost.shape)}")
    if work is not None and work.first_item.numel() != batch * n_kv_heads + 1:
        raise ValueError(f"the work list is for {work.first_item.numel() - 1} rows, not {batch * n_kv_heads}")


def check_reduced(
    pages: Sequence[Pages],
    page_table: Tensor,
    lengths: Tensor,
    ranks: Tensor,
    key_bases: Tensor,
    value_bases: Tensor,
    batch: int,
    n_kv_heads: int,
    dims: tuple[int, int],
) -> None:
    """Raise ValueError unless pages of a reduced space, ranks and bases fit to heads of these full dimensions."""
    if not pages:
        raise ValueError("there must be pages of at least one layout, got none")
    layout = pages[0].layout
    for other in pages[1:]:
        if other.anchor is not pages[0].anchor:
            raise ValueError(
                "pages of all layouts must share one anchor: make them with Pages(..., anchor=first.anchor)"
            )
        if other.layout.page_size != layout.page_size:
            raise ValueError(
                f"pages of all layouts must have one page size, got {layout.page_size} and {other.layout.page_size}"
            )
    check_pages(pages[0], page_table, lengths, batch * n_kv_heads)
    if layout.page_size < 16:
        raise ValueError(f"kernels need pages of at least 16 tokens to attend, got {layout.page_size}")
    if ranks.shape != (n_kv_heads, 2) or ranks.dtype != torch.int32 or not ranks.is_contiguous():
        raise ValueError(
            f"ranks must be [{n_kv_heads}, 2] int32 and contiguous, got {ranks.dtype} {tuple(ranks.shape)}"
        )
    _check_bases(key_bases, "key_bases", n_kv_heads, dims[0], max(part.layout.key_dim for part in pages))
    _check_bases(value_bases, "value_bases", n_kv_heads, dims[1], max(part.layout.value_dim for part in pages))
    uneven = [part.layout for part in pages if part.layout.key_dim % RANK_STEP or part.layout.value_dim % RANK_STEP]
    if uneven:
        raise ValueError(
            f"ranks must be multiples of {RANK_STEP}, got pages of {uneven[0].key_dim} and {uneven[0].value_dim}"
        )


def _check_bases(bases: Tensor, name: str, n_kv_heads: int, dim: int, largest: int) -> None:
    if bases.dim() != 3 or bases.shape[:2] != (n_kv_heads, dim) or bases.dtype != torch.float32:
        raise ValueError(
            f"{name} must be [{n_kv_heads}, {dim or 'Dv'}, largest rank] float32, got {bases.dtype} {tuple(bases.shape)}"
        )
    if not largest <= bases.shape[2] <= dim:
        raise ValueError(
            f"{name} must have as many columns as the largest rank of the pages, {largest}, and {dim} at most, "
            f"got {bases.shape[2]}"
        )


def compile_cases(arch: str, kernel: Any) -> list[CompileCase]:
    """Head dimension 128 with ranks up to 96 in every mode, 64 with ranks up to 64, and the projections of both."""
    main = PageLayout(32, 96, 96, torch.bfloat16)
    others = [
        *(PageLayout(size, 96, 96, torch.bfloat16) for size in (16, 64)),
        *(PageLayout(32, 96, 96, dtype) for dtype in (torch.float16, torch.float32)),
        PageLayout(32, 96, 32, torch.bfloat16),
        PageLayout(32, 128, 128, torch.bfloat16),
    ]
    small = [PageLayout(size, 64, 64, torch.bfloat16) for size in (16, 32)]
    cases = [_case(arch, kernel, 128, layout) for layout in (main, *others)]
    cases += [_case(arch, kernel, 64, layout) for layout in (*small, PageLayout(32, 8, 8, torch.bfloat16))]
    cases += [_case(arch, kernel, 128, main, **{mode: True}) for mode in ("balanced", "softcap")]
    cases += [_case(arch, kernel, 128, main, group=group) for group in (7, 71)]
    codes = PageLayout(32, 96, 96, torch.int8)
    cases += [_case(arch, kernel, 128, codes), _case(arch, kernel, 128, codes, step=RANK_STEP)]
    return [*cases, *lowrank_project.compile_cases()]


def _case(
    arch: str,
    kernel: Any,
    dim: int,
    largest: PageLayout,
    *,
    group: int = 4,
    softcap: bool = False,
    balanced: bool = False,
    step: int | None = None,
) -> CompileCase:
    launch, dtype = launch_options(arch, largest, group), query_dtype(largest)
    step = step or (CODE_RANK_STEP if largest.is_int8 else RANK_STEP)
    flags = {"softcap": softcap, "balanced": balanced, "upcast": False}
    values = constants(largest, group, launch, dtype=dtype, rank_step=step, **flags)
    number = POINTER_TYPES[dtype]
    types = {
        "QUERY": number,
        "ANCHOR": POINTER_TYPES[largest.dtype],
        "PAGE_TABLE": "*i64",
        "LENGTHS": "*i32",
        "RANKS": "*i32",
    }
    types |= dict.fromkeys(("PARTIAL_OUTPUT", "PARTIAL_MAX", "PARTIAL_SUM"), "*fp32")
    types |= {"logit_factor": "fp32", "cap_factor": "fp32"} | dict.fromkeys(("n_columns", "share", "n_kv_heads"), "i32")
    optional = {"ITEM_ROW": ("*i32", balanced), "ITEM_FIRST_PAGE": ("*i32", balanced)}
    optional["QUERY_REST"] = (number, largest.dtype != torch.float32)
    for name, (kind, given) in optional.items():
        if given:
            types[name] = kind
        else:
            values[name] = None
    both = largest.key_dim == largest.value_dim
    rank = f"R{largest.key_dim}" if both else f"R{largest.key_dim}/{largest.value_dim}"
    words = [f"D{dim} {rank} P{largest.page_size} {number.removeprefix('*')}", f"G{group}" if group != 4 else ""]
    words += ["softcap" if softcap else "", "balanced" if balanced else ""]
    words += [f"int8 step {step}" if largest.is_int8 else ""]
    config = " ".join(filter(None, words))
    return CompileCase(
        "lowrank_decode", config, kernel, types, values, launch.num_warps, launch.num_stages,
        kv_loop=True, load_bytes=CODE_BYTES if largest.is_int8 else 16,
    )  # fmt: skip
