"""Close the gaps that evicted tokens leave: move the kept tokens of each row to its front, within its pages.

Why it is safe in place: the i-th kept token comes from slot kept[i] >= i, and tiles of tokens go forward. A tile that
starts at i reads slots >= i only, and earlier tiles wrote slots < i only, so it reads nothing that an earlier tile has
overwritten. Within a tile a slot may be read by one warp and written by another; the barrier between the tile's loads
and its stores puts every read first. Nothing is read twice, so the order of stores does not matter.

A program moves one slice of the words of a token for all tokens of a row: slices never touch the same bytes, so no
program waits for another. Bits are moved, whatever they mean: a page's dtype plays no part.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvpress_kernels.launch import CompileCase, check_device
from kvpress_kernels.page_store import (
    INT8_LLAMA,
    POINTER_TYPES,
    SHIPPED_LAYOUTS,
    check_pages,
    check_ragged,
    layout_label,
    page_at,
)
from kvpress_kernels.pages import PageLayout, Pages

#: 32-bit words of a token that a program moves: 64 bytes, two memory sectors
SLICE_WORDS = 16
#: tokens that are in flight at a time
TILE_TOKENS = 256
NUM_WARPS = 8


@triton.jit
def _token_at(ANCHOR, row_table, slot, wanted, PAGE: tl.constexpr, OFFSET: tl.constexpr, WORDS: tl.constexpr):
    """Pointers [T] to the first 32-bit word that a part of the page has of the row's tokens `slot` [T]."""
    page = page_at(ANCHOR, tl.load(row_table + slot // PAGE, mask=wanted, other=0))
    return page.to(tl.pointer_type(tl.int32), bitcast=True) + (OFFSET + slot % PAGE * WORDS)


@triton.jit
def _move(
    ANCHOR, row_table, row_kept, n_kept, first_word,
    OFFSET: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Move words first_word .. first_word + WIDTH of one part (keys, values, scales or positions) of all kept tokens."""
    word = first_word + tl.arange(0, WIDTH)
    tile = tl.arange(0, TILE)
    # Where the next tile's tokens are is looked up before this tile is stored: two reads less to wait for in a row.
    source = tl.load(row_kept + tile, mask=tile < n_kept, other=0)
    source_at = _token_at(ANCHOR, row_table, source, tile < n_kept, PAGE, OFFSET, WORDS)
    for start in range(0, n_kept, TILE):
        target = start + tile
        moved = (target < n_kept) & (source != target)
        mask = moved[:, None] & (word < WORDS)[None, :]
        target_at = _token_at(ANCHOR, row_table, target, moved, PAGE, OFFSET, WORDS)
        words = tl.load(source_at[:, None] + word[None, :], mask=mask, other=0)
        following = target + TILE
        source = tl.load(row_kept + following, mask=following < n_kept, other=0)
        source_at = _token_at(ANCHOR, row_table, source, following < n_kept, PAGE, OFFSET, WORDS)
        tl.debug_barrier()  # all warps have read this tile before any overwrites it
        tl.store(target_at[:, None] + word[None, :], words, mask=mask)


@triton.jit(do_not_specialize=["table_stride"])
def _compact(
    ANCHOR, PAGE_TABLE, LENGTHS, KEPT, OFFSETS, table_stride,
    PAGE: tl.constexpr, KEY_WORDS: tl.constexpr, VALUE_WORDS: tl.constexpr,
    VALUE_OFFSET: tl.constexpr, SCALE_OFFSET: tl.constexpr, POSITION_OFFSET: tl.constexpr,
    KEY_SLICES: tl.constexpr, VALUE_SLICES: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = tl.load(OFFSETS + row)
    n_kept = tl.load(OFFSETS + row + 1) - first
    row_table, row_kept = PAGE_TABLE + row * table_stride, KEPT + first
    if part < KEY_SLICES:
        _move(ANCHOR, row_table, row_kept, n_kept, part * SLICE, 0, KEY_WORDS, SLICE, PAGE, TILE)
    elif part < KEY_SLICES + VALUE_SLICES:
        first_word = (part - KEY_SLICES) * SLICE
        _move(ANCHOR, row_table, row_kept, n_kept, first_word, VALUE_OFFSET, VALUE_WORDS, SLICE, PAGE, TILE)
    else:
        _move(ANCHOR, row_table, row_kept, n_kept, 0, POSITION_OFFSET, 1, 1, PAGE, TILE)
        if SCALE_OFFSET is not None:
            _move(ANCHOR, row_table, row_kept, n_kept, 0, SCALE_OFFSET, 1, 1, PAGE, TILE)
        tl.store(LENGTHS + row, n_kept)  # no program reads it


def compact(pages: Pages, page_table: Tensor, lengths: Tensor, kept: Tensor, offsets: Tensor) -> None:
    """Keep the tokens `kept[offsets[r] : offsets[r + 1]]` of each row r, in this order, and set `lengths` to their number.

    page_table: [R, M] int64. lengths: [R] int32 stored tokens, set in place. kept: [total] int32 slots, strictly
    ascending within a row and below its length, which is not checked. offsets: [R + 1] int32 ascending. Keys, values
    (codes with their scales) and positions move; slots behind the new length keep what they held.

    Never waits for the device. Raises ValueError for tensors that do not fit together.
    """
    check_pages(pages, page_table, lengths)
    rows = page_table.shape[0]
    check_ragged(kept, offsets, rows, "kept")
    check_device(pages.anchor, page_table, lengths, kept, offsets)
    constants = _constants(pages.layout)
    if rows == 0:
        return
    slices = (
        (constants["KEY_SLICES"] or 0) + (constants["VALUE_SLICES"] or 0) + 1
    )  # the last one moves positions and scales
    _compact[(slices, rows)](
        pages.anchor, page_table, lengths, kept, offsets, page_table.stride(0), **constants, num_warps=NUM_WARPS
    )


def _constants(layout: PageLayout) -> dict[str, int | None]:
    key_bytes, value_bytes = (dim * layout.dtype.itemsize for dim in (layout.key_dim, layout.value_dim))
    if key_bytes % 4 or value_bytes % 4:
        raise ValueError(
            f"a token's keys and values must fill whole 32-bit words, got {key_bytes} and {value_bytes} bytes"
        )
    return {
        "PAGE": layout.page_size,
        "KEY_WORDS": key_bytes // 4,
        "VALUE_WORDS": value_bytes // 4,
        "VALUE_OFFSET": layout.value_offset // 4,
        "SCALE_OFFSET": layout.scale_offset // 4 if layout.is_int8 else None,
        "POSITION_OFFSET": layout.position_offset // 4,
        "KEY_SLICES": triton.cdiv(key_bytes // 4, SLICE_WORDS),
        "VALUE_SLICES": triton.cdiv(value_bytes // 4, SLICE_WORDS),
        "SLICE": SLICE_WORDS,
        "TILE": TILE_TOKENS,
    }


def compile_cases(arch: str) -> list[CompileCase]:
    """The configurations that are shipped for an architecture."""
    cases = []
    for layout in (*SHIPPED_LAYOUTS, INT8_LLAMA):
        types = {"ANCHOR": POINTER_TYPES[layout.dtype], "PAGE_TABLE": "*i64", "table_stride": "i32"}
        types |= dict.fromkeys(("LENGTHS", "KEPT", "OFFSETS"), "*i32")
        cases.append(CompileCase("compact", layout_label(layout), _compact, types, _constants(layout), NUM_WARPS, 1))
    return cases
