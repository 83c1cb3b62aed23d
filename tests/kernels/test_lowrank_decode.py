"""The low-rank decode kernel against its float64 reference, and the reference against attention over K U U^T and V W W^T."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

from kvpress_kernels.bench.lowrank_decode import decode_bytes
from kvpress_kernels.bench.ragged_decode import decode_bytes as full_bytes
from kvpress_kernels.bench.shapes import FULL
from kvpress_kernels.check.lowrank_decode import Reduced, bases, mixed_ranks, reduced
from kvpress_kernels.dispatch import op
from kvpress_kernels.lowrank_decode import compile_cases
from kvpress_kernels.lowrank_decode import lowrank_decode as kernel
from kvpress_kernels.pages import PageLayout, Pages
from kvpress_kernels.reference.lowrank_decode import lowrank_decode as reference
from kvpress_kernels.work_list import work_list

FP32 = 2e-6  # relative error of a float32 result
CPU = torch.device("cpu")
RANKS = [(8, 64), (64, 16), (24, 8), (16, 40)]


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """What is not written is NaN."""
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, seed: int, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(lengths, ranks=RANKS, group=2, dim=64, page=16, dtype=torch.float32, held=None) -> tuple[tuple, Reduced]:
    """Operands of a step over rows of `lengths`, and what holds them. held: dtype of the pages, that of the query by default."""
    heads = len(ranks)
    held = reduced(CPU, page, held or dtype, ranks, lengths)
    query = normal(len(lengths) // heads, heads, group, dim, seed=1, dtype=dtype)
    both = (bases(CPU, dim, [pair[i] for pair in ranks], seed=i) for i in (0, 1))
    return (query, held.pages, held.page_table, held.lengths, held.ranks, *both), held


def wide(operands: tuple, **options) -> Tensor:
    """The reference in float64."""
    query, *others = operands
    return reference(query.double(), *others, **{"scale": 0.2, **options})


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


# --- the reference


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("with_lost", [False, True])
def test_reference_is_attention_over_projected_keys_and_values(softcap, with_sinks, with_lost):
    dim, value_dim, page, group, ranks = 32, 24, 4, 2, [(8, 16), (24, 8), (8, 16)]
    heads, lengths = len(ranks), [0, 1, 9, 4, 5, 12]
    held = reduced(CPU, page, torch.float64, ranks, lengths)
    key_bases, value_bases = torch.zeros(heads, dim, 24).double(), torch.zeros(heads, value_dim, 16).double()
    for head, (key_rank, value_rank) in enumerate(ranks):
        key_bases[head, :, :key_rank] = torch.linalg.qr(normal(dim, key_rank, seed=head, dtype=torch.float64))[0]
        value_bases[head, :, :value_rank] = torch.linalg.qr(
            normal(value_dim, value_rank, seed=head, dtype=torch.float64)
        )[0]
    query = normal(2, heads, group, dim, seed=5, dtype=torch.float64)
    sinks = normal(heads * group, seed=6, dtype=torch.float64) if with_sinks else None
    lost = normal(heads, value_dim, seed=7, dtype=torch.float64) if with_lost else None
    expected = torch.zeros(2, heads, group, value_dim).double()
    for row, length in enumerate(lengths):
        batch, head = divmod(row, heads)
        U, W = (part[head, :, :rank] for part, rank in zip((key_bases, value_bases), ranks[head], strict=True))
        keys, values = (normal(length, d, seed=10 * row + d, dtype=torch.float64) for d in (dim, value_dim))
        slots = torch.arange(length)
        own = next(p for p in held.pages if p.layout == PageLayout(page, *ranks[head], torch.float64))
        own.write(held.page_table[row, slots // page], slots % page, keys @ U, values @ W, slots)
        logits = 0.2 * query[batch, head] @ (keys @ U @ U.T).T  # [G, n]
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        weights = logits.exp()
        total = weights.sum(1)
        if sinks is not None:
            total = total + sinks.view(heads, group)[head].exp()
        expected[batch, head] = weights @ (values @ W @ W.T) / total.clamp(min=1e-300)[:, None]
        if lost is not None:
            expected[batch, head] += lost[head]
    found = reference(
        query, held.pages, held.page_table, held.lengths, held.ranks, key_bases, value_bases,
        scale=0.2, softcap=softcap, sinks=sinks, lost=lost,
    )  # fmt: skip
    torch.testing.assert_close(found, expected)


# --- the kernel


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("ranks", [RANKS, [(16, 64), (64, 16), (48, 16), (32, 32)]])
def test_codes(dtype, tolerance, ranks):
    """Ranks that are multiples of 8, and of 16, as wider loads need."""
    operands, held = make([0, 17, 40, 15], ranks, group=3, dtype=dtype, held=torch.int8)
    options = {"sinks": normal(12, seed=8), "softcap": 5.0, "lost": normal(4, 64, seed=9)}
    work = work_list(held.lengths, 16, held.page_table.shape[1], 2)
    for chosen in ({}, options):
        expected = wide(operands, **chosen)
        assert error(kernel(*operands, scale=0.2, **chosen), expected) <= tolerance
        assert error(kernel(*operands, scale=0.2, work=work, **chosen), expected) <= tolerance


@pytest.mark.parametrize("page", [16, 32])
@pytest.mark.parametrize("group", [1, 7])
def test_ranks_that_differ_in_one_call(page, group):
    operands, _ = make([0, 1, page - 1, page, page + 1, 70, 3, 0], group=group, page=page)
    assert error(kernel(*operands, scale=0.2), wide(operands)) <= FP32


@pytest.mark.parametrize(
    ("ranks", "dim"), [([(8, 8)], 8), ([(96, 96)], 128), ([(96, 8), (8, 96)], 128), ([(40, 24)], 40), ([(64, 64)], 64)]
)
def test_shapes(ranks, dim):
    operands, _ = make([0, 45, 1, 16][: 2 * len(ranks)], ranks=ranks, dim=dim)
    assert error(kernel(*operands, scale=0.2), wide(operands)) <= FP32


def test_large_groups_take_several_programs():
    operands, _ = make([40, 0, 17, 1], group=20)
    assert error(kernel(*operands, scale=0.2), wide(operands)) <= FP32


def test_values_of_another_dimension_than_keys():
    operands, _ = make([20, 0, 17, 1])
    operands = (*operands[:-1], bases(CPU, 72, [pair[1] for pair in RANKS], seed=1))
    found = kernel(*operands, scale=0.2)
    assert found.shape == (1, 4, 2, 72)
    assert error(found, wide(operands)) <= FP32


@pytest.mark.parametrize("lengths", [[0, 0, 0, 0], [1, 1, 1, 1], [150, 0, 3, 100]])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_splits_and_items(lengths, chunk):
    operands, held = make(lengths)
    work = None if chunk is None else work_list(held.lengths, 16, held.page_table.shape[1], chunk)
    assert error(kernel(*operands, scale=0.2, work=work), wide(operands)) <= FP32


@pytest.mark.parametrize(
    ("softcap", "with_sinks", "with_lost"),
    [(None, True, False), (2.0, False, False), (None, False, True), (2.0, True, True)],
)
def test_softcap_sinks_and_lost(softcap, with_sinks, with_lost):
    operands, _ = make([0, 5, 16, 150, 30, 31, 0, 2])
    options = {
        "softcap": softcap,
        "sinks": normal(8, seed=3) if with_sinks else None,
        "lost": normal(4, 64, seed=4) if with_lost else None,
    }
    found = kernel(*operands, scale=0.2, **options)
    assert error(found, wide(operands, **options)) <= FP32
    if with_lost:
        assert torch.equal(found[0, 0], options["lost"][0].expand(2, -1)), "an empty row"
    else:
        assert not found[0, 0].any()


@pytest.mark.parametrize("rank", [8, 24])
def test_numbers_behind_a_row_are_not_read(rank):
    """One token in a page of NaN: a lane beyond the rank would be the NaN of the next token."""
    ranks = [(rank, rank), (64, 64)]
    operands, held = make([1, 1, 16, 1], ranks=ranks)
    layout = PageLayout(16, rank, rank, torch.float32)
    own = next(pages for pages in held.pages if pages.layout == layout)
    page = own.read(held.page_table[:1, 0])
    assert page.keys[0, 1:].isnan().all()
    assert page.values[0, 1:].isnan().all()
    found = kernel(*operands, scale=0.2)
    assert error(found, wide(operands)) <= FP32
    W = operands[-1][0, :, :rank]  # of one token, all weight is on it
    torch.testing.assert_close(found[0, 0], (W @ page.values[0, 0]).expand(2, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    operands, _ = make([0, 1, 17, 60], dtype=dtype)
    found = kernel(*operands, scale=0.2)
    assert found.dtype == dtype
    # the interpreter truncates what it stores in bfloat16
    assert error(found, wide(operands)) <= {torch.bfloat16: 8e-3, torch.float16: 4e-4}[dtype]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_pages_of_a_smaller_dtype_than_the_query(stored):
    operands, _ = make([0, 1, 17, 60], dtype=stored)
    operands = (normal(1, 4, 2, 64, seed=1), *operands[1:])
    found = kernel(*operands, scale=0.2)
    assert found.dtype == torch.float32
    assert error(found, wide(operands)) <= {torch.bfloat16: 2e-3, torch.float16: 4e-4}[stored]


def test_large_logits_are_not_lost_in_the_projected_query():
    """Logits around 80: in one float16 part the query would shift them by 0.02 and weights by as much."""
    operands, _ = make([60, 40, 60, 40], ranks=[(64, 64), (16, 16)], dtype=torch.float16, group=4)
    query, pages, table, *_, U, _ = operands
    largest = 0.0
    for head, own in enumerate(pages):
        keys = own.read(table[head, :2]).keys.flatten(0, 1).double()
        largest = max(largest, float((query[0, head].double() @ U[head, :, : keys.shape[1]].double() @ keys.T).max()))
    found, expected = kernel(*operands, scale=80 / largest), wide(operands, scale=80 / largest)
    assert error(found, expected) <= 4e-4


def test_two_runs_are_bitwise_equal():
    operands, _ = make([150, 20, 0, 3])
    assert torch.equal(kernel(*operands, scale=0.2), kernel(*operands, scale=0.2))


def test_a_query_that_is_a_view():
    operands, _ = make([20, 40, 3, 0])
    strided = operands[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    assert torch.equal(kernel(strided, *operands[1:], scale=0.2), kernel(*operands, scale=0.2))


def test_no_sequences():
    operands, _ = make([])
    assert kernel(*operands, scale=0.2).shape == (0, 4, 2, 64)


def test_both_backends_are_found_and_take_the_same():
    assert inspect.signature(kernel).parameters == inspect.signature(reference).parameters
    operands, _ = make([20, 40, 3, 0])
    found, expected = (op("lowrank_decode", backend)(*operands, scale=0.2) for backend in ("triton", "torch"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def other_pages(*layout) -> list[Pages]:
    return [Pages(PageLayout(*layout), "cpu")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(4, 2, 64)}, "query must be"),
        ({"query": torch.zeros(1, 4, 2, 64, dtype=torch.float64)}, "kernels read"),
        ({"query": torch.zeros(1, 4, 2, 32)}, r"key_bases must be \[4, 32"),
        ({"query": torch.zeros(2, 4, 2, 64)}, "4 rows for 8"),
        ({"pages": []}, "at least one layout"),
        ({"pages": other_pages(16, 8, 8, torch.float32) + other_pages(16, 8, 8, torch.float32)}, "share one anchor"),
        ({"pages": other_pages(8, 8, 8, torch.float32)}, "at least 16 tokens"),
        ({"pages": other_pages(48, 8, 8, torch.float32)}, "power of two"),
        ({"pages": other_pages(16, 8, 8, torch.float64)}, "kernels read"),
        ({"pages": other_pages(16, 12, 8, torch.float32)}, "multiples of 8"),
        ({"pages": other_pages(16, 128, 8, torch.float32)}, "largest rank of the pages, 128"),
        ({"lengths": torch.zeros(4, dtype=torch.int64)}, "lengths must be"),
        ({"page_table": torch.zeros(4, 3, dtype=torch.int32)}, "page_table must be"),
        ({"ranks": torch.zeros(4, 2, dtype=torch.int64)}, r"ranks must be \[4, 2\] int32"),
        ({"ranks": torch.zeros(2, 2, dtype=torch.int32)}, r"ranks must be \[4, 2\] int32"),
        ({"key_bases": torch.zeros(4, 64, 64, dtype=torch.float16)}, "key_bases must be .* float32"),
        ({"key_bases": torch.zeros(4, 64, 72)}, "64 at most"),
        ({"value_bases": torch.zeros(4, 64)}, "value_bases must be"),
        ({"value_bases": torch.zeros(4, 64, 48)}, "largest rank of the pages, 64"),
        ({"sinks": torch.zeros(5)}, "8 logits"),
        ({"lost": torch.zeros(4, 63)}, r"lost must be \[4, 64\]"),
        ({"scale": 0.0}, "positive"),
        ({"softcap": -1.0}, "positive"),
        ({"work": work_list(torch.zeros(3, dtype=torch.int32), 16, 3, 8)}, "for 3 rows, not 4"),
        ({"ranks": torch.zeros(4, 2, dtype=torch.int32, device="meta")}, "one device"),
    ],
)
def test_bad_input(change, message):
    operands, _ = make([5, 20, 0, 1])
    names = ("query", "pages", "page_table", "lengths", "ranks", "key_bases", "value_bases")
    given = dict(zip(names, operands, strict=True)) | {"scale": 1.0}
    with pytest.raises(ValueError, match=message):
        kernel(**{**given, **change})


def test_pages_of_two_sizes_are_refused():
    operands, held = make([5, 20, 0, 1])
    other = Pages(PageLayout(32, 8, 8, torch.float32), "cpu", anchor=held.pages[0].anchor)
    with pytest.raises(ValueError, match="one page size, got 16 and 32"):
        kernel(operands[0], [*held.pages, other], *operands[2:], scale=1.0)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_compile_cases_name_every_argument(arch):
    cases = compile_cases(arch)
    assert len({(case.op, case.config) for case in cases}) == len(cases)
    for case in cases:
        assert set(case.types) | set(case.constants) == set(case.kernel.arg_names)
        assert not set(case.types) & set(case.constants)
        assert not case.constants.get("UPCAST")


def test_ranks_of_the_checks_are_mixed():
    assert mixed_ranks(128, 4) == [(8, 32), (32, 8), (64, 96), (96, 64)]
    assert mixed_ranks(24, 2) == [(8, 8), (8, 8)]


def test_bytes_follow_from_the_ranks():
    counts = [32768] * 8
    full = full_bytes(FULL.layout(), counts, 4, "none", 132)
    half, quarter = (decode_bytes(FULL, 1, 32768, [rank] * 8, 132) for rank in (64, 32))
    mixed = decode_bytes(FULL, 1, 32768, [32, 96] * 4, 132)
    assert half == pytest.approx(full / 2, rel=0.03)
    assert quarter == pytest.approx(full / 4, rel=0.05)
    assert half < mixed < 1.02 * half, "partial results and bases are as wide as the largest rank"
    assert math.isclose(half - quarter, 8 * 32768 * 2 * 32 * 2, rel_tol=0.03)
