"""Appending against a plain Python model of rows: all bytes of all pages are compared, so nothing else may change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from page_rows import Rows

from kvpress_kernels import append as kernel_module
from kvpress_kernels.append import append as kernel
from kvpress_kernels.append import compile_cases
from kvpress_kernels.pages import PageLayout
from kvpress_kernels.reference.append import append as reference

BOTH = pytest.mark.parametrize("append", [kernel, reference], ids=["kernel", "reference"])
SMALL = PageLayout(4, 8, 16, torch.float32)


def new_tokens(rows: Rows, batch: int, n_tokens: int, dtype: torch.dtype | None = None):
    """Keys and values as a model makes them: views [B, Hkv, q, D] of [B, q, Hkv, D]."""
    n_kv, dtype = len(rows.lengths) // batch, dtype or rows.layout.dtype
    dims = (rows.layout.key_dim, rows.layout.value_dim)
    return [rows.normal(batch, n_tokens, n_kv, dim, dtype=dtype).transpose(1, 2) for dim in dims]


def check(append, rows: Rows, batch: int, columns: torch.Tensor, valid=None, dtype=None) -> None:
    """One append, and what it should do to the pages and lengths, token by token."""
    n_tokens, n_kv = len(columns), len(rows.lengths) // batch
    keys, values = new_tokens(rows, batch, n_tokens, dtype)
    expected, lengths = rows.image(), rows.lengths.tolist()
    for row in range(len(lengths)):
        b, h = divmod(row, n_kv)
        for t in range(n_tokens):
            if valid is None or valid[b, t]:
                token = rows.token(expected, row, lengths[row])
                token.store(keys[b, h, t], values[b, h, t], int(columns[t]))
                lengths[row] += 1
    append(keys, values, columns, rows.pages, rows.table, rows.lengths, valid=valid)
    expected.assert_equals_pages()
    assert rows.lengths.tolist() == lengths


def rows_with_room(lengths: list[int], layout: PageLayout, room: int, seed: int = 0) -> Rows:
    return Rows(lengths, layout, reserved=[n + room for n in lengths], seed=seed)


@BOTH
@pytest.mark.parametrize("n_tokens", [1, 2, 17, 33])
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_land_behind_their_row(append, n_tokens, masked):
    rows = rows_with_room([0, 1, 15, 16, 17, 40], PageLayout(16, 16, 16, torch.float32), n_tokens)
    valid = torch.rand(2, n_tokens, generator=rows.draw) < 0.6 if masked else None
    check(append, rows, 2, torch.arange(100, 100 + n_tokens), valid)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(24, 24), (80, 64), (16, 96)])
def test_dtypes_and_dims(append, dtype, key_dim, value_dim):
    rows = rows_with_room([3, 16], PageLayout(16, key_dim, value_dim, dtype), 3)
    check(append, rows, 1, torch.arange(3))
    check(append, rows, 1, torch.tensor([9], dtype=torch.int32))


@BOTH
def test_tokens_are_stored_in_the_dtype_of_the_pages(append):
    rows = rows_with_room([3, 16], PageLayout(16, 16, 16, torch.float16), 2)
    check(append, rows, 2, torch.arange(2), dtype=torch.float32)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_codes_are_those_of_the_reference(append, dtype, n_tokens):
    rows = rows_with_room([3, 16], PageLayout(16, 24, 40, torch.int8), n_tokens)
    check(append, rows, 1, torch.arange(n_tokens), dtype=dtype)


@BOTH
@pytest.mark.parametrize(
    "row", [[0.0] * 8, [-0.0] * 8, [1e-9] * 8, [7e-6, -2e-6, *[0.0] * 6], [3e8, -1.0, *[0.0] * 6], [1e3, *[1e-3] * 7],
            [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127.0, 0.0], [65504.0 * 127, *[1.0] * 7], [3e38, -3e38, *[1.0] * 6]]
)  # fmt: skip
def test_codes_of_extreme_vectors(append, row):
    """Zeros, numbers below the smallest scale and above the largest, an outlier, and halves, which round to even."""
    rows = rows_with_room([3], PageLayout(16, 8, 8, torch.int8), 1)
    keys = torch.tensor(row).view(1, 1, 1, 8)
    expected = rows.image()
    rows.token(expected, 0, 3).store(keys[0, 0, 0], -keys[0, 0, 0], 7)
    append(keys, -keys, torch.tensor([7]), rows.pages, rows.table, rows.lengths)
    expected.assert_equals_pages()


@BOTH
@pytest.mark.parametrize(
    "valid", [[[False], [True]], [[False] * 3, [True] * 3], [[False, False, True], [True, False, False]]]
)
def test_padding_takes_no_slot(append, valid):
    rows = rows_with_room([4, 0, 3, 7], SMALL, 3)
    check(append, rows, 2, torch.arange(len(valid[0])), torch.tensor(valid))


@BOTH
def test_rows_without_a_valid_token_need_no_page(append):
    rows = Rows([4, 0], SMALL)
    check(append, rows, 1, torch.arange(2), torch.zeros(1, 2, dtype=torch.bool))
    check(append, rows, 1, torch.arange(1), torch.zeros(1, 1, dtype=torch.bool))


@BOTH
def test_no_tokens(append):
    check(append, Rows([4, 0], SMALL), 1, torch.arange(0))


@BOTH
def test_a_mask_that_is_a_view(append):
    rows = rows_with_room([4, 0], SMALL, 4)
    mask = torch.tensor([[True, False, False, True, True, True]])
    check(append, rows, 1, torch.arange(6)[::2], mask[:, ::2])


@settings(max_examples=12, deadline=None)
@given(
    append=st.sampled_from([kernel, reference]),
    batch=st.integers(1, 2),
    n_kv=st.integers(1, 2),
    steps=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_any_sequence_of_appends(append, batch, n_kv, steps, masked, seed, data):
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=batch * n_kv, max_size=batch * n_kv))
    rows, column = rows_with_room(lengths, SMALL, sum(steps), seed), 50
    for n_tokens in steps:
        valid = torch.rand(batch, n_tokens, generator=rows.draw) < 0.7 if masked else None
        check(append, rows, batch, torch.arange(column, column + n_tokens), valid)
        column += n_tokens


def test_bad_input():
    rows = rows_with_room([1, 1], SMALL, 2)
    keys, values = new_tokens(rows, 1, 2)
    columns, table, lengths = torch.arange(2), rows.table, rows.lengths

    def refused(sentence, keys=keys, values=values, columns=columns, table=table, lengths=lengths, valid=None):
        with pytest.raises(ValueError, match=sentence):
            kernel(keys, values, columns, rows.pages, table, lengths, valid=valid)

    refused("expected keys", keys=keys[..., :-1])
    refused("expected keys", values=values[:, :, :1])
    refused("expected keys", keys=keys[0])
    refused("kernels read bfloat16", keys=keys.double())
    refused("last dimension of keys", keys=keys.transpose(2, 3).contiguous().transpose(2, 3))
    refused("columns must be", columns=columns[:1])
    refused("columns must be", columns=columns.float())
    refused("page_table must be", table=table.int())
    refused("page_table must be", table=table.t().contiguous().t())
    refused("page_table has 1 rows", table=table[:1])
    refused("lengths must be", lengths=lengths.long())
    refused("lengths must be", lengths=lengths[:1])
    refused("valid must be", valid=torch.ones(2, 2, dtype=torch.bool))
    refused("valid must be", valid=torch.ones(1, 2))
    refused("on one device", columns=columns.to("meta"))
    odd = Rows([1], PageLayout(3, 8, 16, torch.float32), reserved=[2])
    with pytest.raises(ValueError, match="power of two"):
        kernel(keys[:, :1], values[:, :1], columns, odd.pages, odd.table, odd.lengths)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_every_configuration_names_every_argument(arch):
    for case in compile_cases(arch):
        assert sorted([*case.types, *case.constants]) == sorted(kernel_module._append.arg_names)
        assert case.aligned <= set(case.types)
