"""Joining partial results against attention over all logits at once, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvpress_kernels.reference.split_reduce import split_reduce as reference
from kvpress_kernels.split_reduce import compile_cases
from kvpress_kernels.split_reduce import split_reduce as kernel

BOTH = pytest.mark.parametrize("op", [kernel, reference], ids=["kernel", "reference"])


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """What is not written is NaN."""
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)


class Items:
    """Partial results of rows with the given items, and what they are parts of.

    counts: for each row the logits of each item, 0 for an item that found nothing. past_end: items of no row.
    """

    def __init__(self, counts, *, group=2, n_kv=1, value_dim=16, past_end=0, size=1.0, sinks=False, seed=0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.n_kv, n_items = n_kv, sum(map(len, counts)) + past_end
        self.first = torch.tensor([0, *map(len, counts)]).cumsum(0).to(torch.int32)
        self.sinks = size * torch.randn(n_kv * group, generator=draw) if sinks else None
        self.output = torch.full((n_items, group, value_dim), math.nan)
        self.largest, self.total = torch.full((2, n_items, group), math.nan)
        self.expected, self.lse = torch.zeros(len(counts), group, value_dim).double(), torch.zeros(len(counts), group)
        self.lse = self.lse.double()
        item = 0
        for row, items in enumerate(counts):
            parts = []
            for count in items:
                logits = size * torch.randn(group, count, generator=draw)  # in powers of two
                values = torch.randn(count, value_dim, generator=draw)
                parts.append((logits.double() * math.log(2), values.double()))
                self.largest[item], self.total[item] = -math.inf, 0.0
                if count:
                    self.largest[item] = logits.amax(1)
                    weights = torch.exp2(logits.double() - logits.double().amax(1, keepdim=True))
                    self.total[item], self.output[item] = weights.sum(1), weights @ values.double()
                item += 1
            logits = torch.cat([part for part, _ in parts], 1) if parts else torch.zeros(group, 0).double()
            values = torch.cat([part for _, part in parts]) if parts else torch.zeros(0, value_dim).double()
            if sinks:
                sink = self.sinks.view(n_kv, group)[row % n_kv].double()
                logits, values = torch.cat([logits, sink[:, None]], 1), torch.cat([values, 0 * self.expected[0, :1]])
            self.lse[row] = logits.logsumexp(1) if logits.shape[1] else -math.inf
            self.expected[row] = logits.softmax(1).nan_to_num() @ values

    def join(self, op, first=None, dtype=torch.float32):
        wide = torch.float64 if op is reference else torch.float32
        partials = (self.output.to(wide), self.largest.to(wide), self.total.to(wide))
        first = self.first if first is None else first
        return op(*partials, first, group_sinks=self.sinks, n_kv_heads=self.n_kv, dtype=dtype)

    def check(self, op, first=None) -> None:
        found = self.join(op, first)
        assert found.output.dtype == torch.float32
        assert error(found.output_wide, self.expected) <= 2e-6
        assert error(found.output, self.expected) <= 2e-6
        torch.testing.assert_close(found.lse.double(), self.lse, rtol=2e-6, atol=2e-6)


def error(found: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(found).all()
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@BOTH
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    "counts",
    [
        [[5]],
        [[0]],
        [[]],
        [[], [3, 1], [], [0, 0], [7, 0, 2], []],
        [[0, 4], [4, 0]],
        [[2] * 15, [2] * 16, [2] * 17],
        [[0] * 20 + [3], [3] + [0] * 20],
    ],
    ids=str,
)
def test_items_of_any_number(op, counts, sinks):
    Items(counts, sinks=sinks, past_end=3).check(op)


@BOTH
def test_every_row_has_as_many_items(op):
    items = Items([[3, 0, 1], [0, 0, 0], [1, 1, 1], [2, 5, 0]], n_kv=2, sinks=True)
    items.check(op, first=3)
    assert torch.equal(items.join(op, 3).output, items.join(op).output)


@BOTH
@pytest.mark.parametrize(("group", "value_dim"), [(1, 16), (3, 24), (7, 80), (2, 256)])
@pytest.mark.parametrize("n_kv", [1, 2])
def test_shapes(op, group, value_dim, n_kv):
    Items([[3, 2], [4]], group=group, value_dim=value_dim, n_kv=n_kv, sinks=True).check(op)


@BOTH
@pytest.mark.parametrize("sinks", [False, True])
def test_large_logits(op, sinks):
    """Logits of +-100: most items vanish beside the largest."""
    Items([[3, 2, 9], [4, 1], [30]], size=50.0, sinks=sinks).check(op)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_dtype(dtype):
    items = Items([[3, 2], [0]])
    found = items.join(kernel, dtype=dtype)
    assert found.output.dtype == dtype
    # the interpreter truncates
    assert error(found.output, items.expected) <= {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]


def test_two_runs_are_bitwise_equal():
    items = Items([[3] * 40, [2] * 7], sinks=True)
    for first, second in zip(items.join(kernel), items.join(kernel), strict=True):
        assert torch.equal(first, second)


def test_no_rows():
    assert Items([]).join(kernel).output.shape == (0, 2, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partial_output": torch.zeros(6, 2, 16, dtype=torch.float64)}, "float32 and contiguous"),
        ({"partial_output": torch.zeros(6, 16, 2).transpose(1, 2)}, "float32 and contiguous"),
        ({"partial_max": torch.zeros(6, 3)}, r"must be \[6, 2\]"),
        ({"first_item": 4}, "cannot be 4 for every row"),
        ({"first_item": 0}, "cannot be 0 for every row"),
        ({"first_item": torch.tensor([0, 3, 6])}, "first_item must be int32"),
        ({"group_sinks": torch.zeros(3)}, "must hold 4 logits"),
        ({"n_kv_heads": 4}, "no multiple of 4"),
        ({"partial_sum": torch.zeros(6, 2, device="meta")}, "one device"),
    ],
)
def test_bad_input(change, message):
    given = {
        "partial_output": torch.zeros(6, 2, 16), "partial_max": torch.zeros(6, 2), "partial_sum": torch.ones(6, 2),
        "first_item": 3, "n_kv_heads": 2, "dtype": torch.float32,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        kernel(**{**given, **change})


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_compile_cases_name_every_argument(arch):
    cases = compile_cases(arch)
    assert len({case.config for case in cases}) == len(cases)
    for case in cases:
        assert set(case.types) | set(case.constants) == set(case.kernel.arg_names)
        assert not set(case.types) & set(case.constants)
