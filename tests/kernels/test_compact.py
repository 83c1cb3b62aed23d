"""Compaction against a plain Python model of rows: all bytes of all pages are compared, stale ones included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from page_rows import Rows

from kvpress_kernels import compact as kernel_module
from kvpress_kernels.compact import compact as kernel
from kvpress_kernels.compact import compile_cases
from kvpress_kernels.pages import PageLayout
from kvpress_kernels.reference.compact import compact as reference

BOTH = pytest.mark.parametrize("compact", [kernel, reference], ids=["kernel", "reference"])
SMALL = PageLayout(4, 8, 16, torch.float32)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles and slices in a row of a few tokens."""
    monkeypatch.setattr(kernel_module, "TILE_TOKENS", 8)
    monkeypatch.setattr(kernel_module, "SLICE_WORDS", 4)


def ragged(kept: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """kept [total] and offsets [R + 1]."""
    flat = torch.tensor([slot for row in kept for slot in row], dtype=torch.int32)
    return flat, torch.tensor([0, *[len(row) for row in kept]]).cumsum(0).int()


def check(compact, rows: Rows, kept: list[list[int]]) -> None:
    """One compaction, and what it should do: dest i holds what slot kept[i] held, and nothing else changes."""
    before, expected = rows.image(), rows.image()
    for row, slots in enumerate(kept):
        for target, source in enumerate(slots):
            rows.token(expected, row, target).copy_(rows.token(before, row, source))
    compact(rows.pages, rows.table, rows.lengths, *ragged(kept))
    expected.assert_equals_pages()
    assert rows.lengths.tolist() == [len(slots) for slots in kept]


def some(length: int, share: float, rows: Rows) -> list[int]:
    return (torch.rand(length, generator=rows.draw) < share).nonzero().flatten().tolist()


@BOTH
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_kept_tokens_close_up(compact, share, small_tiles):
    rows = Rows([0, 1, 15, 16, 17, 70], PageLayout(16, 16, 24, torch.float32))
    check(compact, rows, [some(int(length), share, rows) for length in rows.lengths])


@BOTH
@pytest.mark.parametrize(
    "kept",
    [
        [[], [], [], []],  # all rows become empty
        [list(range(n)) for n in (40, 7, 0, 33)],  # nothing moves
        [[39], [6], [], [32]],  # the last token of each
        [list(range(1, 40)), list(range(1, 7)), [], list(range(1, 33))],  # everything moves by one
        [list(range(20)), [0, 1, 2, 6], [], [*range(16), 32]],  # a start that stays, then a jump
        [list(range(20, 40)), [5, 6], [], list(range(17, 33))],
    ],
    ids=["none", "all", "last", "shift", "start", "end"],
)
def test_special_choices(compact, kept, small_tiles):
    check(compact, Rows([40, 7, 0, 33], SMALL), kept)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(24, 24), (80, 64), (2, 96)])
def test_dtypes_and_dims(compact, dtype, key_dim, value_dim):
    rows = Rows([35, 12], PageLayout(16, key_dim, value_dim, dtype))
    check(compact, rows, [some(35, 0.5, rows), some(12, 0.5, rows)])


@BOTH
@pytest.mark.parametrize(("key_dim", "value_dim"), [(24, 24), (80, 64), (4, 96)])
def test_codes_move_with_their_scales(compact, key_dim, value_dim):
    rows = Rows([35, 12, 17], PageLayout(16, key_dim, value_dim, torch.int8))
    check(compact, rows, [some(int(length), 0.5, rows) for length in rows.lengths])


@BOTH
def test_codes_with_the_smallest_scales_are_not_made_anew(compact):
    """Of numbers below 127 times the smallest scale other codes would be found than these."""
    rows = Rows([6], PageLayout(16, 8, 8, torch.int8))
    image = rows.image()
    token = rows.token(image, 0, 5)
    token.store(torch.full((8,), 7.2e-6), torch.full((8,), -1e-7), 9)
    for (_, raw), slab in zip(image.slabs, rows.pages.slabs, strict=True):
        slab.copy_(raw.view_as(slab))
    check(compact, rows, [[2, 5]])


@BOTH
def test_longer_than_a_tile(compact):
    rows = Rows([290], PageLayout(32, 2, 2, torch.float32))
    check(compact, rows, [some(290, 0.95, rows)])


@BOTH
def test_twice(compact, small_tiles):
    rows = Rows([30, 22], SMALL)
    check(compact, rows, [some(30, 0.7, rows), some(22, 0.7, rows)])
    check(compact, rows, [some(int(length), 0.7, rows) for length in rows.lengths])


@BOTH
def test_bits_are_moved_whatever_they_mean(compact):
    """Signalling NaNs, infinities and denormal numbers arrive as they were."""
    rows = Rows([6], PageLayout(4, 4, 4, torch.float32))
    patterns = torch.tensor([0x7F800001, 0x7F800000, 1, -(2**31)], dtype=torch.int32)
    image = rows.image()
    rows.token(image, 0, 5).key.view(torch.int32).copy_(patterns)
    for (_, raw), slab in zip(image.slabs, rows.pages.slabs, strict=True):
        slab.copy_(raw.view_as(slab))
    compact(rows.pages, rows.table, rows.lengths, *ragged([[5]]))
    assert torch.equal(rows.token(rows.image(), 0, 0).key.view(torch.int32), patterns)


@settings(max_examples=15, deadline=None)
@given(
    compact=st.sampled_from([kernel, reference]),
    rows_kept=st.lists(
        st.integers(0, 26).flatmap(
            lambda n: st.tuples(st.just(n), st.sets(st.integers(0, max(n - 1, 0)), max_size=n).map(sorted))
        ),
        min_size=1,
        max_size=4,
    ),
    tile=st.sampled_from([1, 2, 8, 32]),
    seed=st.integers(0, 1000),
)
def test_any_choice_of_tokens(compact, rows_kept, tile, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_module, "TILE_TOKENS", tile)
        check(compact, Rows([n for n, _ in rows_kept], SMALL, seed=seed), [kept for _, kept in rows_kept])


def test_bad_input():
    rows = Rows([5, 3], SMALL)
    kept, offsets = ragged([[0, 2], [1]])

    def refused(sentence, pages=rows.pages, table=rows.table, lengths=rows.lengths, kept=kept, offsets=offsets):
        with pytest.raises(ValueError, match=sentence):
            kernel(pages, table, lengths, kept, offsets)

    refused("page_table must be", table=rows.table.int())
    refused("lengths must be", lengths=rows.lengths.long())
    refused("lengths must be", lengths=rows.lengths[:1])
    refused("kept must be", kept=kept.long())
    refused("offsets must be", offsets=offsets[1:])
    refused("on one device", kept=kept.to("meta"))
    odd = Rows([5, 3], PageLayout(4, 3, 4, torch.bfloat16))
    refused("whole 32-bit words", pages=odd.pages, table=odd.table)
    wide = Rows([5, 3], PageLayout(4, 4, 4, torch.float64))
    refused("pages hold torch.float64", pages=wide.pages, table=wide.table)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_every_configuration_names_every_argument(arch):
    for case in compile_cases(arch):
        assert sorted([*case.types, *case.constants]) == sorted(kernel_module._compact.arg_names)
