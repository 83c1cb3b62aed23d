"""Gathering a prefill's kept tokens against a plain Python model of rows: all bytes of all pages are compared."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from page_rows import Rows

from kvpress_kernels import gather_pages as kernel_module
from kvpress_kernels.gather_pages import compile_cases
from kvpress_kernels.gather_pages import gather_pages as kernel
from kvpress_kernels.pages import PageLayout
from kvpress_kernels.reference.gather_pages import gather_pages as reference

BOTH = pytest.mark.parametrize("gather_pages", [kernel, reference], ids=["kernel", "reference"])
SMALL = PageLayout(4, 8, 16, torch.float32)
N_TOKENS = 60


def empty_rows(kept: list[list[int]], layout: PageLayout, seed: int = 0) -> Rows:
    """Rows that hold nothing yet, with pages for what each will keep."""
    return Rows([0] * len(kept), layout, reserved=[len(columns) for columns in kept], seed=seed)


def ragged(kept: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """columns [total] and offsets [R + 1]."""
    columns = torch.tensor([column for row in kept for column in row], dtype=torch.int32)
    return columns, torch.tensor([0, *[len(row) for row in kept]]).cumsum(0).int()


def prefill(rows: Rows, batch: int, dtype: torch.dtype | None = None):
    """Keys and values of all tokens, as views [B, Hkv, n, D] of [B, n, Hkv, D]."""
    layout, n_kv = rows.layout, len(rows.lengths) // batch
    dims, dtype = (layout.key_dim, layout.value_dim), dtype or layout.dtype
    return [rows.normal(batch, N_TOKENS, n_kv, dim, dtype=dtype).transpose(1, 2) for dim in dims]


def check(gather_pages, rows: Rows, batch: int, kept: list[list[int]], max_kept: int | None = None, dtype=None) -> None:
    """One gather, and what it should do to the pages, token by token."""
    keys, values = prefill(rows, batch, dtype)
    expected, n_kv = rows.image(), len(kept) // batch
    for row, chosen in enumerate(kept):
        for slot, column in enumerate(chosen):
            token = rows.token(expected, row, slot)
            token.store(keys[row // n_kv, row % n_kv, column], values[row // n_kv, row % n_kv, column], column)
    columns, offsets = ragged(kept)
    most = max(map(len, kept)) if max_kept is None else max_kept
    gather_pages(keys, values, columns, offsets, rows.pages, rows.table, max_kept=most)
    expected.assert_equals_pages()


def evenly(count: int) -> list[int]:
    """`count` ascending columns spread over the prompt."""
    return [index * N_TOKENS // count for index in range(count)]


@BOTH
@pytest.mark.parametrize("page_size", [16, 32])
def test_every_row_gets_its_own_tokens(gather_pages, page_size):
    kept = [evenly(n) for n in (0, 1, page_size - 1, page_size, page_size + 1, 50)]
    check(gather_pages, empty_rows(kept, PageLayout(page_size, 16, 16, torch.float32)), 2, kept)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(24, 24), (80, 64), (16, 96)])
def test_dtypes_and_dims(gather_pages, dtype, key_dim, value_dim):
    kept = [evenly(18), evenly(5)]
    check(gather_pages, empty_rows(kept, PageLayout(16, key_dim, value_dim, dtype)), 1, kept)


@BOTH
def test_tokens_are_stored_in_the_dtype_of_the_pages(gather_pages):
    kept = [evenly(18), evenly(5)]
    check(gather_pages, empty_rows(kept, PageLayout(16, 16, 16, torch.float16)), 1, kept, dtype=torch.float32)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("page_size", [16, 32])
def test_codes_are_those_of_the_reference(gather_pages, dtype, page_size):
    kept = [evenly(n) for n in (0, 1, page_size - 1, page_size, page_size + 1, 50)]
    check(gather_pages, empty_rows(kept, PageLayout(page_size, 24, 40, torch.int8)), 2, kept, dtype=dtype)


@BOTH
def test_the_bound_may_be_larger_than_any_row(gather_pages):
    kept = [evenly(3), evenly(11), []]
    check(gather_pages, empty_rows(kept, SMALL), 1, kept, max_kept=14)


@BOTH
def test_tokens_in_any_order(gather_pages):
    kept = [[5, 3, 3, 59, 0, 8], [7]]
    check(gather_pages, empty_rows(kept, SMALL), 1, kept)


@BOTH
def test_nothing_kept(gather_pages):
    kept: list[list[int]] = [[], []]
    check(gather_pages, empty_rows(kept, SMALL), 1, kept)


@BOTH
def test_a_slice_of_a_longer_list(gather_pages):
    """Offsets need not start at zero, and columns may be longer than the last of them."""
    kept = [evenly(6), evenly(2)]
    rows = empty_rows(kept, SMALL)
    keys, values = prefill(rows, 1)
    expected = empty_rows(kept, SMALL)
    columns, offsets = ragged(kept)
    filler = torch.full((3,), N_TOKENS - 1, dtype=torch.int32)
    longer = torch.cat([filler, columns, filler])
    gather_pages(keys, values, longer, offsets + 3, rows.pages, rows.table, max_kept=6)
    gather_pages(keys, values, columns, offsets, expected.pages, expected.table, max_kept=6)
    for row, chosen in enumerate(kept):
        for slot in range(len(chosen)):
            pair = zip(rows.token(rows.image(), row, slot).__dict__.values(),
                       expected.token(expected.image(), row, slot).__dict__.values(), strict=True)  # fmt: skip
            assert all(torch.equal(found, wanted) for found, wanted in pair)


@settings(max_examples=15, deadline=None)
@given(
    gather_pages=st.sampled_from([kernel, reference]),
    kept=st.lists(st.sets(st.integers(0, N_TOKENS - 1), max_size=14).map(sorted), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_any_choice_of_tokens(gather_pages, kept, seed):
    check(gather_pages, empty_rows(kept, SMALL, seed), 1, kept)


def test_the_reference_refuses_a_bound_that_is_none():
    kept = [evenly(6), evenly(2)]
    with pytest.raises(ValueError, match="keeps 6 tokens"):
        check(reference, empty_rows(kept, SMALL), 1, kept, max_kept=5)


def test_bad_input():
    kept = [evenly(3), evenly(2)]
    rows = empty_rows(kept, SMALL)
    keys, values = prefill(rows, 1)
    columns, offsets = ragged(kept)

    def refused(sentence, keys=keys, values=values, columns=columns, offsets=offsets, table=rows.table, most=3):
        with pytest.raises(ValueError, match=sentence):
            kernel(keys, values, columns, offsets, rows.pages, table, max_kept=most)

    refused("expected keys", values=values[..., :-1])
    refused("last dimension of values", values=values.transpose(2, 3).contiguous().transpose(2, 3))
    refused("kernels read bfloat16", values=values.double())
    refused("columns must be", columns=columns.long())
    refused("columns must be", columns=columns[None])
    refused("offsets must be", offsets=offsets[:-1])
    refused("offsets must be", offsets=offsets.long())
    refused("page_table has 1 rows", table=rows.table[:1])
    refused("do not fit into the 2 pages", most=9)
    refused("on one device", columns=columns.to("meta"))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_every_configuration_names_every_argument(arch):
    for case in compile_cases(arch):
        assert sorted([*case.types, *case.constants]) == sorted(kernel_module._gather_pages.arg_names)
        assert case.aligned <= set(case.types)
