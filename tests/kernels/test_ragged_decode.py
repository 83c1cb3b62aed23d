"""The paged decode kernel against its float64 reference, and the reference against attention token by token."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from page_rows import Rows
from torch import Tensor

from kvpress_kernels import decode_launch
from kvpress_kernels.pages import PageLayout, Pages
from kvpress_kernels.ragged_decode import compile_cases
from kvpress_kernels.ragged_decode import ragged_decode as kernel
from kvpress_kernels.reference.ragged_decode import Decoded
from kvpress_kernels.reference.ragged_decode import ragged_decode as reference
from kvpress_kernels.work_list import work_list

FP32 = 2e-6  # relative error of a float32 result


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """What is not written is NaN."""
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)


def make(lengths, group=3, n_kv=1, layout=None, reserved=None, seed=0) -> tuple[Tensor, Rows]:
    rows = Rows(lengths, layout or PageLayout(16, 16, 16, torch.float32), reserved=reserved, seed=seed)
    query = rows.normal(len(lengths) // n_kv, n_kv, group, rows.layout.key_dim, dtype=rows.layout.dtype)
    return query, rows


def decode(op, query, rows: Rows, **options) -> Decoded:
    return op(query, rows.pages, rows.table, rows.lengths, **{"scale": 0.25, "statistics": "values", **options})


def used(rows: Rows) -> Tensor:
    """[R, M], pages that hold a token."""
    return torch.arange(rows.table.shape[1]) * rows.layout.page_size < rows.lengths[:, None]


def error(found: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(found).all()
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def assert_same(found: Decoded, expected: Decoded, rows: Rows, tolerance=FP32, stored=FP32) -> None:
    """All that both returned; stored: tolerance of what is kept in the pages' or the query's dtype."""
    assert error(found.output_wide, expected.output_wide) <= tolerance
    assert error(found.output, expected.output) <= stored
    assert found.output.dtype == found.page_values.dtype == rows.layout.dtype
    blind = expected.lse == -math.inf
    assert torch.equal(found.lse == -math.inf, blind)
    torch.testing.assert_close(found.lse[~blind].double(), expected.lse[~blind].double(), rtol=tolerance, atol=2e-6)
    at = used(rows)
    torch.testing.assert_close(found.page_lse[at].double(), expected.page_lse[at].double(), rtol=tolerance, atol=2e-6)
    assert error(found.page_values[at], expected.page_values[at]) <= stored


# --- the reference


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_reference_is_attention_token_by_token(softcap, with_sinks):
    layout = PageLayout(4, 8, 6, torch.float64)
    query, rows = make([0, 1, 4, 5, 11, 12], group=2, n_kv=2, layout=layout)
    sinks = rows.normal(4).double() if with_sinks else None
    found = decode(reference, query, rows, softcap=softcap, sinks=sinks)
    image = rows.image()
    for row, length in enumerate(rows.lengths.tolist()):
        tokens = [rows.token(image, row, slot) for slot in range(length)]
        for g in range(2):
            logits = [0.25 * float(query[row // 2, row % 2, g] @ token.key) for token in tokens]
            if softcap:
                logits = [softcap * math.tanh(x / softcap) for x in logits]
            total = sum(map(math.exp, logits)) + (math.exp(sinks[row % 2 * 2 + g]) if with_sinks else 0)
            parts = [math.exp(x) * token.value for x, token in zip(logits, tokens, strict=True)]
            expected = sum(parts, torch.zeros(6).double()) / max(total, 1e-300)
            torch.testing.assert_close(found.output[row // 2, row % 2, g], expected)
            torch.testing.assert_close(found.output_wide[row, g], expected)
            assert float(found.lse[row, g]) == pytest.approx(math.log(total) if total else -math.inf)
            for first in range(0, length, 4):
                mass = sum(map(math.exp, logits[first : first + 4]))
                assert float(found.page_lse[row, first // 4, g]) == pytest.approx(math.log(mass))
                torch.testing.assert_close(found.page_values[row, first // 4, g], sum(parts[first : first + 4]) / mass)


def test_reference_returns_only_the_statistics_that_are_asked_for():
    query, rows = make([5])
    assert decode(reference, query, rows, statistics="none")[3:] == (None, None)
    assert decode(reference, query, rows, statistics="lse").page_values is None


# --- the kernel

SHAPES = [  # group, (key_dim, value_dim), page size
    (1, (16, 16), 16),
    (3, (24, 40), 16),
    (7, (64, 64), 32),
    (4, (80, 96), 16),
    (20, (16, 24), 16),
    (70, (16, 16), 16),
    (2, (192, 128), 64),
]


@pytest.mark.parametrize(("group", "dims", "size"), SHAPES)
def test_shapes(group, dims, size):
    lengths = [0, 1, size - 1, size, size + 1, 64] if group < 16 else [0, 40]
    query, rows = make(lengths, group, n_kv=2, layout=PageLayout(size, *dims, torch.float32))
    assert_same(decode(kernel, query, rows), decode(reference, query.double(), rows), rows)


@pytest.mark.parametrize("lengths", [[0], [1], [0, 0], [150], [0, 150], [3, 16, 0, 149]])
@pytest.mark.parametrize("reserved", [0, 200])
def test_splits(lengths, reserved):
    query, rows = make(lengths, reserved=[max(n, reserved) for n in lengths])
    assert_same(decode(kernel, query, rows), decode(reference, query.double(), rows), rows)


def test_splits_follow_from_shapes():
    assert decode_launch.n_splits(8, 1000, 132) == 66
    assert decode_launch.n_splits(8, 41, 132) == 11  # no split of less than four pages
    assert decode_launch.n_splits(1024, 1000, 132) == 1
    assert decode_launch.n_splits(0, 0, 132) == 1


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_balanced_grid(chunk):
    query, rows = make([0, 100, 1, 33, 0], reserved=[0, 110, 64, 40, 60], n_kv=5, group=1)
    expected = decode(reference, query.double(), rows)
    columns = rows.table.shape[1]
    now = work_list(rows.lengths, 16, columns, chunk)
    assert_same(decode(kernel, query, rows, work=now), expected, rows)
    reserved = work_list(torch.tensor([0, 110, 64, 40, 60], dtype=torch.int32), 16, columns, chunk)
    assert_same(decode(kernel, query, rows, work=reserved), expected, rows)
    exact = work_list(rows.lengths, 16, columns, chunk, max_items=int(now.first_item[-1]))
    assert_same(decode(kernel, query, rows, work=exact), expected, rows)


def test_balanced_grid_without_a_single_page():
    query, rows = make([0, 0])
    found = decode(kernel, query, rows, work=work_list(rows.lengths, 16, 0, 8))
    assert not found.output.any()
    assert torch.equal(found.lse, torch.full_like(found.lse, -math.inf))


@pytest.mark.parametrize(
    ("softcap", "with_sinks", "balanced"),
    [(None, True, False), (2.0, False, False), (2.0, True, True), (50.0, False, True), (50.0, True, False)],
)
def test_softcap_and_sinks(softcap, with_sinks, balanced):
    query, rows = make([0, 5, 16, 150], group=2, n_kv=2)
    options = {"softcap": softcap, "sinks": 2 * rows.normal(4) if with_sinks else None}
    work = work_list(rows.lengths, 16, rows.table.shape[1], 2) if balanced else None
    found = decode(kernel, query, rows, work=work, **options)
    assert_same(found, decode(reference, query.double(), rows, **options), rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    query, rows = make([0, 1, 17, 60], layout=PageLayout(16, 64, 64, dtype))
    expected = decode(reference, query.double(), rows)
    # the interpreter truncates what it stores in half precision
    rounding = {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert_same(decode(kernel, query, rows), expected, rows, stored=rounding)


@pytest.mark.parametrize("statistics", ["none", "lse", "values"])
def test_statistics_do_not_change_the_rest(statistics):
    query, rows = make([0, 60, 17])
    expected, found = decode(kernel, query, rows), decode(kernel, query, rows, statistics=statistics)
    assert (found.page_lse is None) == (statistics == "none")
    assert (found.page_values is None) == (statistics != "values")
    assert torch.allclose(found.output, expected.output, rtol=1e-6, atol=1e-7)
    assert torch.allclose(found.lse, expected.lse, rtol=1e-6)
    if found.page_lse is not None:
        assert torch.equal(found.page_lse[used(rows)], expected.page_lse[used(rows)])


def change_keys(rows: Rows, change) -> None:
    """Replace the keys [n, Dk] of each row by change(keys)."""
    for row, length in enumerate(rows.lengths.tolist()):
        entries, slots = rows.table[row].repeat_interleave(16)[:length], torch.arange(length)
        keys, values = (part.flatten(0, 1)[:length] for part in rows.pages.read(entries[::16])[:2])
        rows.pages.write(entries, slots % 16, change(keys), values, slots)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("balanced", [False, True])
def test_large_logits_keep_their_differences(sign, balanced):
    """Logits around +-80 that differ by little, so that many tokens count; products are exact in float32."""
    query, rows = make([150, 40, 16], group=2, reserved=[200, 200, 200])
    query = (query * 8).round() / 8
    query[..., -1] = 64
    change_keys(
        rows, lambda keys: torch.cat([(keys[:, :-1] * 8).round() / 8, torch.full_like(keys[:, :1], 5 * sign)], 1)
    )
    expected = decode(reference, query.double(), rows)
    assert 70 < expected.lse.abs().min() < 100
    work = work_list(rows.lengths, 16, rows.table.shape[1], 2) if balanced else None
    found = decode(kernel, query, rows, work=work)
    assert_same(found, expected, rows)
    # a tenth of what rounding the scaled logits would cost
    assert error(found.output, expected.output) < 3e-7
    assert error(found.page_values[used(rows)], expected.page_values[used(rows)]) < 3e-7


@pytest.mark.parametrize("statistics", ["lse", "values"])
def test_pages_whose_weights_vanish_beside_others_have_statistics(statistics):
    """Every second page is 200 below the first one, where exp(-200) is 0 in float32."""
    query, rows = make([150, 33, 70], group=2)
    query[..., -1] = 8
    change_keys(
        rows, lambda keys: keys - 100 * F.one_hot(torch.tensor(15), 16) * (torch.arange(len(keys)) // 16 % 2)[:, None]
    )
    found, expected = decode(kernel, query, rows, statistics=statistics), decode(reference, query.double(), rows)
    assert (expected.page_lse[:, 0] - expected.page_lse[:, 1]).min() > 150
    if statistics == "values":
        assert_same(found, expected, rows)
    else:
        torch.testing.assert_close(
            found.page_lse[used(rows)].double(), expected.page_lse[used(rows)], rtol=FP32, atol=0
        )


@pytest.mark.parametrize("peak", [20.0, 80.0])
def test_rounding_is_that_of_plain_attention(peak):
    """Random logits as large as `peak`: what a float32 product rounds off cannot be won back, but no more is lost."""
    query, rows = make([100], group=8, layout=PageLayout(16, 64, 64, torch.float32))
    stored = rows.pages.read(rows.table[0, :7])
    keys, values = (part.flatten(0, 1)[:100][None, None].expand(1, 8, -1, -1) for part in (stored.keys, stored.values))
    scale = peak / float((query[0, 0] @ keys[0, 0].T).abs().max())
    expected = decode(reference, query.double(), rows, scale=scale).output
    plain = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, scale=scale).transpose(1, 2)
    assert error(decode(kernel, query, rows, scale=scale).output, expected) <= max(2 * error(plain, expected), FP32)


def test_constant_logits_give_the_mean():
    query, rows = make([0, 1, 50])
    query.zero_()
    found = decode(kernel, query, rows)
    assert_same(found, decode(reference, query.double(), rows), rows)
    assert float(found.lse[2, 0]) == pytest.approx(math.log(50))


def test_two_runs_are_bitwise_equal():
    query, rows = make([150, 20], reserved=[200, 200])
    for first, second in zip(decode(kernel, query, rows), decode(kernel, query, rows), strict=True):
        assert torch.equal(first.nan_to_num(), second.nan_to_num())


def test_a_query_that_is_a_view():
    query, rows = make([20, 40], group=2, n_kv=2)
    strided = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    assert torch.equal(decode(kernel, strided, rows).output, decode(kernel, query, rows).output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 2, 3, 8)}, "query must be"),
        ({"query": torch.zeros(2, 3, 16)}, "query must be"),
        ({"query": torch.zeros(1, 2, 3, 16, dtype=torch.float16)}, "the pages hold"),
        ({"query": torch.zeros(1, 3, 3, 16)}, "2 rows for 3"),
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, "lengths must be"),
        ({"page_table": torch.zeros(2, 3, dtype=torch.int32)}, "page_table must be"),
        ({"pages": Pages(PageLayout(8, 16, 16, torch.float32), "cpu")}, "at least 16 tokens"),
        ({"pages": Pages(PageLayout(48, 16, 16, torch.float32), "cpu")}, "power of two"),
        ({"pages": Pages(PageLayout(16, 16, 16, torch.float64), "cpu")}, "kernels read"),
        ({"sinks": torch.zeros(5)}, "6 logits"),
        ({"scale": 0.0}, "positive"),
        ({"softcap": -1.0}, "positive"),
        ({"statistics": "all"}, "statistics must be"),
        ({"work": work_list(torch.zeros(3, dtype=torch.int32), 16, 3, 8)}, "for 3 rows, not 2"),
        ({"lengths": torch.zeros(2, dtype=torch.int32, device="meta")}, "one device"),
    ],
)
def test_bad_input(change, message):
    query, rows = make([5, 20], n_kv=2)
    given = {"query": query, "pages": rows.pages, "page_table": rows.table, "lengths": rows.lengths, "scale": 1.0}
    with pytest.raises(ValueError, match=message):
        kernel(**{**given, **change})


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_compile_cases_name_every_argument(arch):
    cases = compile_cases(arch)
    assert len({case.config for case in cases}) == len(cases) <= 31
    for case in cases:
        assert set(case.types) | set(case.constants) == set(case.kernel.arg_names)
        assert not set(case.types) & set(case.constants)
        assert not case.constants["UPCAST"]


# --- codes: the reference reads what they stand for


def outliers(rows: Rows) -> None:
    """Rows of zeros, one huge number among small ones, and values below the smallest scale."""
    for row, length in enumerate(rows.lengths.tolist()):
        slots, size = torch.arange(length), rows.layout.page_size
        held = rows.pages.read(rows.table[row, : -(-length // size)])
        keys, values = (part.flatten(0, 1)[:length].clone() for part in held[:2])
        keys[::5], values[1::5] = 0, 0
        keys[2::5, 0], values[3::5, 1] = 60, -3000
        values[4::5] = 1e-9
        rows.pages.write(rows.table[row][slots // size], slots % size, keys, values, slots)


@pytest.mark.parametrize("statistics", ["none", "values"])
@pytest.mark.parametrize(("group", "dims", "size"), [(1, (16, 16), 16), (7, (80, 64), 32), (20, (24, 40), 16)])
def test_codes(statistics, group, dims, size):
    lengths = [0, 1, size - 1, size, size + 1, 64]
    _, rows = make(lengths, group, n_kv=2, layout=PageLayout(size, *dims, torch.int8))
    query = rows.normal(3, 2, group, dims[0])
    for change in (lambda rows: None, outliers):
        change(rows)
        found, expected = (
            decode(op, q, rows, statistics=statistics) for op, q in ((kernel, query), (reference, query.double()))
        )
        assert error(found.output_wide, expected.output_wide) <= FP32
        if statistics == "values":
            at = used(rows)
            torch.testing.assert_close(found.page_lse[at].double(), expected.page_lse[at], rtol=FP32, atol=2e-6)
            assert error(found.page_values[at], expected.page_values[at].double()) <= FP32


@pytest.mark.parametrize("statistics", ["none", "values"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, FP32)])
@pytest.mark.parametrize("size", [1e-5, 1.0, 1e4])
def test_codes_under_half_precision_queries(dtype, tolerance, size, statistics):
    """Weights times scales keep their digits, whatever the size of the values: in float16 as on a device."""
    _, rows = make([0, 40, 17], layout=PageLayout(16, 64, 64, torch.int8))
    for row in (1, 2):
        slots = torch.arange(int(rows.lengths[row]))
        keys, values = rows.normal(len(slots), 64), size * rows.normal(len(slots), 64)
        rows.pages.write(rows.table[row][slots // 16], slots % 16, keys, values, slots)
    query = rows.normal(3, 1, 3, 64, dtype=dtype)
    found, expected = (
        decode(op, q, rows, statistics=statistics) for op, q in ((kernel, query), (reference, query.double()))
    )
    assert error(found.output_wide, expected.output_wide) <= tolerance


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("softcap", "balanced"), [(None, True), (50.0, False)])
def test_large_logits_over_codes(sign, softcap, balanced):
    """Logits around +-80, and around 10,000 without their scale in float16, where nothing may overflow."""
    _, rows = make([150, 40, 16], group=2, layout=PageLayout(16, 16, 16, torch.int8), reserved=[200, 200, 200])
    change_keys(rows, lambda keys: torch.cat([keys[:, :-1], torch.full_like(keys[:, :1], 5 * sign)], 1))
    for dtype, tolerance in ((torch.float32, 8e-6), (torch.float16, 2e-3)):  # of 80, the scales round off 5e-6
        query = rows.normal(3, 1, 2, 16)
        query[..., -1] = 64
        query = query.to(dtype)
        options = {"softcap": softcap, "sinks": 70 * torch.ones(2)}
        expected = decode(reference, query.double(), rows, **options)
        work = work_list(rows.lengths, 16, rows.table.shape[1], 2) if balanced else None
        assert error(decode(kernel, query, rows, work=work, **options).output_wide, expected.output_wide) <= tolerance
