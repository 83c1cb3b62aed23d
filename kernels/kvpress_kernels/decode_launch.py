"""How a decode step is launched: warps, stages, splits, and the configurations that are compiled ahead of time.

The table was made by compiling: no shipped configuration spills, and two programs fit on a processor wherever the tiles allow.
No time has been measured.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from kvpress_kernels.launch import INTERPRETED, CompileCase, padded
from kvpress_kernels.page_store import (
    INT8_LAYOUTS,
    INT8_LLAMA,
    POINTER_TYPES,
    SHIPPED_LAYOUTS,
    layout_label,
    page_constants,
    query_dtype,
)
from kvpress_kernels.pages import PageLayout
from kvpress_kernels.reference.ragged_decode import Statistics

#: programs per processor that the plain grid aims at, and the fewest pages that are worth a split
PROGRAMS_PER_PROCESSOR = 4
MIN_SPLIT_PAGES = 4
#: shared memory in bytes that one program may ask for; unknown architectures get the least of all recent ones
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10}
LEAST_SHARED_BYTES = 99 << 10
#: width that loads of codes reach on every architecture: on NVIDIA the compiler lays out values of one byte by eight
CODE_BYTES = 8
_MODES: dict[Statistics, int] = {"none": 0, "lse": 1, "values": 2}


class Launch(NamedTuple):
    """heads: query heads of a group that a program serves, at least 16; larger groups take several programs."""

    num_warps: int
    num_stages: int
    heads: int


def launch_options(arch: str, layout: PageLayout, group: int) -> Launch:
    """Launch for pages of this layout on an architecture ("sm_90", "gfx942")."""
    item_bytes, amd = layout.dtype.itemsize, arch.startswith("gfx")
    key_bytes, value_bytes = (layout.page_size * padded(dim) * item_bytes for dim in (layout.key_dim, layout.value_dim))
    tile_bytes, shared = key_bytes + value_bytes, SHARED_BYTES.get(arch, LEAST_SHARED_BYTES)
    num_warps = 2 if layout.page_size <= 16 else 4 if layout.page_size <= 32 or amd else 8
    # every lane loads 16 bytes of the smaller tile at a time
    num_warps = max(1, min(num_warps, min(key_bytes, value_bytes) // (16 * (64 if amd else 32))))
    heads = 16 if item_bytes == 4 else 32 if padded(layout.value_dim) > 64 else 64  # what registers hold
    if amd:  # one tile in shared memory, the next in registers
        num_stages = 2 if 4 * tile_bytes <= 3 * shared else 1
    elif 3 * tile_bytes <= 0.43 * shared:  # n + 1 stages hold n pages: three if two programs can, ...
        num_stages = 4
    else:  # ... else two if one program can
        num_stages = 3 if 2 * tile_bytes <= 0.85 * shared else 2
    return Launch(num_warps, num_stages, min(heads, padded(group)))


def n_splits(programs: int, columns: int, processors: int) -> int:
    """Splits of each row in the plain grid, from shapes alone so that a captured graph stays valid.

    programs: how many there are without splits. columns: of the page table.
    """
    return max(1, min(-(-PROGRAMS_PER_PROCESSOR * processors // max(programs, 1)), -(-columns // MIN_SPLIT_PAGES)))


def constants(
    layout: PageLayout,
    group: int,
    statistics: Statistics,
    launch: Launch,
    *,
    softcap: bool,
    balanced: bool,
    upcast: bool,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Constexpr arguments of the kernel. dtype: of the query."""
    return {
        **{name: value for name, value in page_constants(layout).items() if name != "POSITION_OFFSET"},
        "GROUP": group,
        "HEADS": launch.heads,
        "STATISTICS": _MODES[statistics],
        "BY_PAGE": statistics != "none" or in_units(layout, dtype),
        "SOFTCAP": softcap,
        "BALANCED": balanced,
        "UPCAST": upcast,
        "STAGES": launch.num_stages,
    }


def in_units(layout: PageLayout, dtype: torch.dtype) -> bool:
    """Whether a product of weights with codes needs the unit of `int8.scaled` for queries of this dtype."""
    return layout.is_int8 and dtype == torch.float16


def upcast(layout: PageLayout, dtype: torch.dtype) -> bool:
    """Whether a kernel widens what it loads. Over codes the interpreter takes the path of a device where it can: in float16."""
    return INTERPRETED and not in_units(layout, dtype)


def compile_cases(arch: str, kernel: Any) -> list[CompileCase]:
    """Every layout with all statistics, the commonest one in every mode, and large groups."""
    llama, tiny = PageLayout(32, 128, 128, torch.bfloat16), PageLayout(32, 16, 16, torch.bfloat16)
    cases = [_case(arch, kernel, layout, "values") for layout in SHIPPED_LAYOUTS if layout != llama]
    cases += [
        _case(arch, kernel, PageLayout(32, 256, 256, torch.float32), "values"),
        _case(arch, kernel, tiny, "values"),
    ]
    cases += [_case(arch, kernel, PageLayout(32, dim, dim, torch.bfloat16), "none") for dim in (64, 256)]
    cases += [_case(arch, kernel, llama, mode) for mode in ("none", "lse", "values")]
    cases += [_case(arch, kernel, llama, mode, balanced=True) for mode in ("none", "values")]
    cases += [_case(arch, kernel, layout, "none") for layout in INT8_LAYOUTS]
    cases += [_case(arch, kernel, INT8_LLAMA, "none", dtype=torch.float16), _case(arch, kernel, INT8_LLAMA, "values")]
    return [*cases, _case(arch, kernel, llama, "values", softcap=True), _case(arch, kernel, llama, "values", group=71)]


def _case(
    arch: str,
    kernel: Any,
    layout: PageLayout,
    statistics: Statistics,
    *,
    group: int = 4,
    softcap: bool = False,
    balanced: bool = False,
    dtype: torch.dtype | None = None,
) -> CompileCase:
    launch, dtype = launch_options(arch, layout, group), dtype or query_dtype(layout)
    values = constants(layout, group, statistics, launch, softcap=softcap, balanced=balanced, upcast=False, dtype=dtype)
    number = POINTER_TYPES[dtype]
    types = {"QUERY": number, "ANCHOR": POINTER_TYPES[layout.dtype], "PAGE_TABLE": "*i64", "LENGTHS": "*i32"}
    types |= dict.fromkeys(("PARTIAL_OUTPUT", "PARTIAL_MAX", "PARTIAL_SUM"), "*fp32")
    types |= {"logit_factor": "fp32", "cap_factor": "fp32", "n_columns": "i32", "share": "i32"}
    optional = {"ITEM_ROW": ("*i32", balanced), "ITEM_FIRST_PAGE": ("*i32", balanced)}
    optional |= {"PAGE_LSE": ("*fp32", statistics != "none"), "PAGE_VALUES": (number, statistics == "values")}
    for name, (kind, given) in optional.items():
        if given:
            types[name] = kind
        else:
            values[name] = None
    words = [layout_label(layout, dtype), statistics, f"G{group}" if group != 4 else ""]
    words += ["softcap" if softcap else "", "balanced" if balanced else ""]
    config = " ".join(filter(None, words))
    return CompileCase(
        "ragged_decode", config, kernel, types, values, launch.num_warps, launch.num_stages,
        kv_loop=True, load_bytes=CODE_BYTES if layout.is_int8 else 16,
    )  # fmt: skip
