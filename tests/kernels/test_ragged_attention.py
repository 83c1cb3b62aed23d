"""Attention of several tokens over pages: the reference against a brute force in float64, the kernel against both."""

from __future__ import annotations

import math

import pytest
import torch
from page_rows import Rows
from torch import Tensor

from kvpress_kernels import ragged_attention as kernel_module
from kvpress_kernels.pages import PageLayout
from kvpress_kernels.ragged_attention import compile_cases
from kvpress_kernels.ragged_attention import ragged_attention as kernel
from kvpress_kernels.reference.packed_attention import packed_attention
from kvpress_kernels.reference.ragged_attention import ragged_attention as reference

BOTH = pytest.mark.parametrize("attention", [kernel, reference], ids=["kernel", "reference"])
#: error relative to the norm of the result; the interpreter truncates when it stores bfloat16
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0, 9.0, -9.0, 1.0])


def brute_force(
    rows: Rows, query: Tensor, query_positions: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """One query and token at a time, in float64, with the tokens found byte by byte."""
    _, n_kv, group, n_queries, _ = query.shape
    image, out = rows.image(), torch.zeros(*query.shape[:4], rows.layout.value_dim, dtype=torch.float64)
    for row, length in enumerate(rows.lengths.tolist()):
        b, h = divmod(row, n_kv)
        tokens = [
            (*token.numbers(), token.position) for slot in range(length) if (token := rows.token(image, row, slot))
        ]
        for g in range(group):
            for q in range(n_queries):
                seen = [token for token in tokens if int(token[2]) <= int(query_positions[q])]
                logits = [scale * float(query[b, h, g, q].double() @ key) for key, _, _ in seen]
                if softcap is not None:
                    logits = [softcap * math.tanh(logit / softcap) for logit in logits]
                sink = [] if sinks is None else [float(sinks[h * group + g])]
                top = max([*logits, *sink], default=0.0)
                total = math.fsum(math.exp(logit - top) for logit in [*logits, *sink])
                for logit, (_, value, _) in zip(logits, seen, strict=True):
                    out[b, h, g, q] += math.exp(logit - top) / total * value
    return out


def queries(rows: Rows, batch: int, group: int, n_queries: int, size: float = 1.0, dtype=None) -> Tensor:
    """As a model makes them: a view [B, Hkv, G, Q, D] of [B, Q, Hkv, G, D]."""
    n_kv, layout = len(rows.lengths) // batch, rows.layout
    made = size * rows.normal(batch, n_queries, n_kv, group, layout.key_dim)
    return made.to(dtype or layout.dtype).permute(0, 2, 3, 1, 4)


def check(
    attention,
    rows: Rows,
    query: Tensor,
    query_positions: Tensor,
    *,
    scale: float = 0.3,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    before = rows.image()
    options = {"scale": scale, "softcap": softcap, "sinks": sinks}
    found = attention(query, rows.pages, rows.table, rows.lengths, query_positions, **options)
    wanted = brute_force(rows, query, query_positions, **options)
    assert found.shape == wanted.shape
    assert found.dtype == query.dtype
    assert (found.double() - wanted).norm() <= TOLERANCE[query.dtype] * wanted.norm()
    assert not found[wanted.abs().sum(-1) == 0].any()  # exactly zero where nothing is seen
    before.assert_equals_pages()
    return found


def in_the_middle(rows: Rows, n_queries: int) -> Tensor:
    """Query positions in any order, some in the past of many stored tokens, the last in the past of all of them."""
    positions = torch.randint(0, 60, (n_queries,), generator=rows.draw)
    positions[-1] = -1
    return positions


@BOTH
@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize("page_size", [16, 32])
def test_rows_of_all_lengths(attention, group, page_size):
    rows = Rows([0, 1, page_size - 1, page_size, page_size + 1, 40], PageLayout(page_size, 16, 16, torch.float32))
    query = queries(rows, 2, group, 3)
    check(attention, rows, query, in_the_middle(rows, 3))


@pytest.mark.parametrize(("group", "n_queries"), [(1, 1), (1, 40), (3, 17), (4, 70), (7, 11), (20, 2)])
def test_tiles_of_queries(group, n_queries):
    """Fewer queries than a tile holds, several tiles, and groups that do not fill one."""
    rows = Rows([37], PageLayout(16, 16, 16, torch.float32))
    query, positions = queries(rows, 1, group, n_queries), in_the_middle(rows, n_queries)
    check(kernel, rows, query, positions)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(24, 24), (80, 64), (16, 96)])
def test_dtypes_and_dims(attention, dtype, key_dim, value_dim):
    rows = Rows([21, 5], PageLayout(16, key_dim, value_dim, dtype))
    query = queries(rows, 1, 2, 3)
    check(attention, rows, query, in_the_middle(rows, 3), scale=key_dim**-0.5)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("group", "dims", "softcap"), [(1, (16, 16), None), (3, (80, 64), 20.0), (7, (24, 40), None)])
def test_codes(attention, dtype, group, dims, softcap):
    rows = Rows([0, 1, 15, 16, 17, 40], PageLayout(16, *dims, torch.int8))
    query = queries(rows, 2, group, 3, dtype=dtype)
    check(
        attention, rows, query, in_the_middle(rows, 3), softcap=softcap, sinks=SINKS[: 3 * group] if group < 3 else None
    )


def test_the_reference_in_float64():
    rows = Rows([21, 0, 5, 16], PageLayout(16, 24, 16, torch.float64))
    check(reference, rows, queries(rows, 2, 3, 4), in_the_middle(rows, 4), softcap=3.0, sinks=SINKS[:6])


@BOTH
@pytest.mark.parametrize("softcap", [None, 2.0, 50.0])
def test_sinks_and_softcap(attention, softcap):
    rows = Rows([21, 0, 33, 16], PageLayout(16, 16, 16, torch.float32))
    query = queries(rows, 2, 3, 3)
    check(attention, rows, query, in_the_middle(rows, 3), softcap=softcap, sinks=SINKS[:6])


@BOTH
def test_sinks_belong_to_query_heads(attention):
    """A sink that swallows everything at one head leaves the others as they are."""
    rows = Rows([20, 20], PageLayout(16, 16, 16, torch.float32))
    sinks = torch.full((4,), -1e4)
    sinks[2] = 1e4  # second KV head, first query head of its group
    out = check(attention, rows, queries(rows, 1, 2, 2), torch.tensor([99, 99]), sinks=sinks)
    silent = (out.abs().sum((-1, -2)) == 0).flatten()
    assert silent.tolist() == [False, False, True, False]


@BOTH
@pytest.mark.parametrize("sinks", [None, SINKS[:2]])
def test_large_logits(attention, sinks):
    """Logits of +-80 and more: the largest is subtracted before any power is taken."""
    rows = Rows([40], PageLayout(16, 16, 16, torch.float32))
    query = queries(rows, 1, 2, 3, size=30.0)
    largest = (rows.pages.read(rows.table[0, :3]).keys.flatten(0, 1)[:40] @ query.flatten(0, 3).T * 0.9).abs().max()
    assert largest > 80
    check(attention, rows, query, torch.tensor([99, 40, 3]), scale=0.9, sinks=sinks)


@BOTH
def test_constant_logits_give_the_mean_of_the_values_seen(attention):
    rows = Rows([18], PageLayout(16, 16, 16, torch.float32), positions=[list(range(18))])
    query = torch.zeros(1, 1, 1, 2, 16)
    out = check(attention, rows, query, torch.tensor([17, 4]))
    values = rows.pages.read(rows.table[0, :2]).values.flatten(0, 1)
    torch.testing.assert_close(out[0, 0, 0], torch.stack([values[:18].mean(0), values[:5].mean(0)]))


@BOTH
def test_a_query_sees_tokens_at_its_own_position_and_none_behind(attention):
    rows = Rows([20], PageLayout(16, 16, 16, torch.float32), positions=[list(range(0, 40, 2))])
    check(attention, rows, queries(rows, 1, 1, 4), torch.tensor([37, 38, 39, 31]))


@BOTH
def test_pages_in_the_future_come_before_and_after_visible_ones(attention):
    """Stored positions need not ascend for the result to be right: every token is judged by its own."""
    places = [*range(50, 66), *range(16), *range(70, 80)]
    rows = Rows([42], PageLayout(16, 16, 16, torch.float32), positions=[places])
    check(attention, rows, queries(rows, 1, 2, 3), torch.tensor([10, 60, 200]))


def test_the_same_as_over_packed_segments():
    rows = Rows([30, 0, 17, 40], PageLayout(16, 24, 16, torch.float32))
    query, positions = queries(rows, 2, 3, 5), in_the_middle(rows, 5)
    flat = rows.pages.read(rows.table[rows.table < 1 << 39])  # pages of all rows, one after another
    pages = [-(-n // 16) for n in rows.lengths.tolist()]
    starts = [16 * sum(pages[:row]) for row in range(4)]
    keys, values, places = (part.flatten(0, 1) for part in flat)
    expected = packed_attention(
        query, keys, values, places, starts, rows.lengths.tolist(), positions, scale=0.3, softcap=4.0, sinks=SINKS[:6]
    )
    for attention in (kernel, reference):
        found = attention(
            query, rows.pages, rows.table, rows.lengths, positions, scale=0.3, softcap=4.0, sinks=SINKS[:6]
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_two_runs_are_bitwise_equal():
    rows = Rows([40, 3], PageLayout(16, 24, 16, torch.float32))
    query, positions = queries(rows, 1, 3, 5), in_the_middle(rows, 5)
    first, second = (
        kernel(query, rows.pages, rows.table, rows.lengths, positions, scale=0.3, sinks=SINKS[:6]) for _ in range(2)
    )
    assert torch.equal(first, second)


@BOTH
def test_no_queries_and_no_rows(attention):
    rows = Rows([3], PageLayout(16, 16, 24, torch.float32))
    out = attention(queries(rows, 1, 2, 0), rows.pages, rows.table, rows.lengths, torch.arange(0), scale=1.0)
    assert out.shape == (1, 1, 2, 0, 24)


@pytest.fixture
def poisoned_memory():
    """torch fills new tensors with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_every_number_of_the_result_is_written(poisoned_memory):
    rows = Rows([19, 0], PageLayout(16, 24, 24, torch.float32))
    query = queries(rows, 1, 3, 5)
    assert torch.empty(3).isnan().all()
    out = kernel(query, rows.pages, rows.table, rows.lengths, torch.tensor([-1, 3, 9, 99, 0]), scale=0.3)
    assert not out.isnan().any()


def test_bad_input():
    rows = Rows([5, 20], PageLayout(16, 16, 16, torch.float32))
    query, positions = queries(rows, 1, 2, 3), torch.arange(3)

    def refused(sentence, query=query, rows=rows, table=None, lengths=None, positions=positions, **options):
        table, lengths = (rows.table if table is None else table), (rows.lengths if lengths is None else lengths)
        with pytest.raises(ValueError, match=sentence):
            kernel(query, rows.pages, table, lengths, positions, **{"scale": 1.0, **options})

    refused("query must be", query=query[..., :8])
    refused("query must be", query=query[0])
    refused("query must be", query=query.half())
    refused("last dimension of query", query=query.transpose(3, 4).contiguous().transpose(3, 4))
    refused("query_positions must be", positions=positions[:2])
    refused("query_positions must be", positions=positions.int())
    refused("sinks must be", sinks=torch.zeros(2))
    refused("must be positive", scale=0.0)
    refused("must be positive", softcap=-1.0)
    refused("page_table has 1 rows", table=rows.table[:1])
    refused("lengths must be", lengths=rows.lengths.long())
    refused("on one device", positions=positions.to("meta"))
    small = Rows([5, 20], PageLayout(8, 16, 16, torch.float32))
    refused("at least 16 tokens", rows=small)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_every_configuration_names_every_argument(arch):
    for case in compile_cases(arch):
        assert sorted([*case.types, *case.constants]) == sorted(kernel_module._ragged_attention.arg_names)
        assert case.aligned <= set(case.types)
