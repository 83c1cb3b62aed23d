"""The work list made on a device against the one made row by row, and that it covers every page once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpress_kernels.reference.work_list import work_list as reference
from kvpress_kernels.work_list import CHUNK_PAGES, compile_cases, prefers_work_list, work_list


def same(lengths: list[int], page_size: int, max_pages: int, chunk_pages: int, **options) -> None:
    stored = torch.tensor(lengths, dtype=torch.int32)
    found = work_list(stored, page_size, max_pages, chunk_pages, **options)
    expected = reference(stored, page_size, max_pages, chunk_pages, **options)
    for name in ("row", "first_page", "first_item"):
        tensor = getattr(found, name)
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
        assert tensor.tolist() == getattr(expected, name).tolist(), name
    assert found.chunk_pages == chunk_pages


@given(
    st.lists(st.integers(0, 200), max_size=8),
    st.sampled_from([1, 4, 16]),
    st.integers(1, 9),
    st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_equals_the_reference(lengths, page_size, chunk_pages, spare):
    max_pages = max((-(-n // page_size) for n in lengths), default=0) + spare
    same(lengths, page_size, max_pages, chunk_pages)
    needed = sum(-(-n // (page_size * chunk_pages)) for n in lengths)
    same(lengths, page_size, max_pages, chunk_pages, max_items=needed + spare)


@pytest.mark.parametrize("make", [work_list, reference])
def test_every_page_is_in_one_item(make):
    lengths, size, chunk = [0, 1, 64, 65, 0, 700, 33], 32, 3
    found = make(torch.tensor(lengths, dtype=torch.int32), size, 25, chunk)
    assert len(found.row) == 7 * 9
    covered = []
    for row in range(len(lengths)):
        for item in range(int(found.first_item[row]), int(found.first_item[row + 1])):
            assert int(found.row[item]) == row
            first = int(found.first_page[item])
            covered += [(row, page) for page in range(first, min(first + chunk, -(-lengths[row] // size)))]
    assert covered == [(row, page) for row, n in enumerate(lengths) for page in range(-(-n // size))]
    assert found.row[int(found.first_item[-1]) :].eq(-1).all()


@pytest.mark.parametrize("bad", [(0, 4, 8), (16, 4, 0), (16, -1, 8)])
def test_bad_input(bad):
    page_size, max_pages, chunk_pages = bad
    with pytest.raises(ValueError, match="make no list"):
        work_list(torch.zeros(2, dtype=torch.int32), page_size, max_pages, chunk_pages)


def test_even_or_little_work_needs_no_list():
    assert not prefers_work_list([])
    assert not prefers_work_list([0, 0])
    assert not prefers_work_list([1000, 10])
    assert not prefers_work_list([100_000] * 8)
    assert prefers_work_list([100_000, 1000, 1000, 1000])
    assert CHUNK_PAGES == 8


def test_nothing_is_compiled():
    assert compile_cases("sm_90") == []
