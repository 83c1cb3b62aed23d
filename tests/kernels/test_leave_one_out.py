"""Shares and changes of single pages and of sets against really removing the pages, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from page_rows import Rows
from torch import Tensor

from kvpress_kernels.joint_change import joint_change as joint_kernel
from kvpress_kernels.leave_one_out import compile_cases
from kvpress_kernels.leave_one_out import leave_one_out as kernel
from kvpress_kernels.pages import PageLayout
from kvpress_kernels.ragged_decode import ragged_decode as decode_kernel
from kvpress_kernels.reference.joint_change import joint_change as joint_reference
from kvpress_kernels.reference.leave_one_out import leave_one_out as reference
from kvpress_kernels.reference.ragged_decode import ragged_decode

SINGLE = pytest.mark.parametrize("op", [kernel, reference], ids=["kernel", "reference"])
JOINT = pytest.mark.parametrize("op", [joint_kernel, joint_reference], ids=["kernel", "reference"])
LENGTHS = [0, 1, 16, 17, 100, 40]


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """What is not written is NaN."""
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)


class Step:
    """A decode step in float64, and what its output would be without some pages.

    boost: added to the logits of one page of each row, the second where there is one.
    """

    def __init__(
        self, lengths=LENGTHS, *, group=3, n_kv=2, dims=(16, 24), sinks=False, boost=0.0, stored=torch.float64
    ) -> None:
        self.rows = Rows(lengths, PageLayout(16, *dims, stored))
        self.query = self.rows.normal(len(lengths) // n_kv, n_kv, group, dims[0]).double()
        self.query[..., -1] = 1
        self.sinks = self.rows.normal(n_kv * group).double() if sinks else None
        for row, length in enumerate(lengths):
            page, size = min(1, max(length - 1, 0) // 16), 16
            slots = torch.arange(min(size, length - page * size) if length else 0)
            entries = self.rows.table[row, page].expand(len(slots))
            stored = self.rows.pages.read(entries[:1])
            keys, values = stored.keys.flatten(0, 1)[: len(slots)], stored.values.flatten(0, 1)[: len(slots)]
            keys[:, -1] += boost
            self.rows.pages.write(entries, slots, keys, values, slots)
        self.decoded = self._attend(self.rows.table, self.rows.lengths)
        self.output = self.decoded.output_wide
        #: error of a share by what float32 rounds off its lse
        self.rounding = 6e-8 * max(1.0, float(self.decoded.lse.nan_to_num(neginf=0).abs().max()))
        self.used = torch.arange(self.rows.table.shape[1]) * 16 < self.rows.lengths[:, None]

    def _attend(self, table: Tensor, lengths: Tensor):
        return ragged_decode(
            self.query, self.rows.pages, table, lengths, scale=1.0, sinks=self.sinks, statistics="values"
        )

    def without(self, removed: Tensor) -> Tensor:
        """|output without the pages - output|, [R, G]: attention over the pages that stay; 0 where nothing stays."""
        table, lengths = self.rows.table.clone(), self.rows.lengths.clone()
        for row in range(len(lengths)):
            kept = (self.used[row] & ~removed[row]).nonzero().flatten()
            n = int(lengths[row])
            table[row, : len(kept)] = self.rows.table[row, kept]
            lengths[row] = sum(min(16, n - 16 * int(page)) for page in kept)
            # a short last page has to stay last: it is, since pages keep their order
        rest = self._attend(table, lengths)
        blind = rest.lse == -math.inf
        return (rest.output_wide - self.output).norm(dim=-1).masked_fill(blind, 0.0)

    def call(self, op, *removed: Tensor, values=torch.float32):
        """The op on this step's statistics, in float32 for kernels, poisoned beyond the rows' pages."""
        wide = torch.float64 if op in (reference, joint_reference) else torch.float32
        found, unused = self.decoded, ~self.used[:, :, None]
        return op(
            found.page_lse.masked_fill(unused, math.nan).to(wide),
            found.page_values.masked_fill(unused[..., None], math.nan).to(wide if wide == torch.float64 else values),
            found.output_wide.to(wide),
            found.lse.to(wide),
            self.rows.lengths,
            16,
            *removed,
            sinks=self.sinks,
        )


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert torch.isfinite(found).all()
    assert_close = torch.testing.assert_close
    assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()) + 1e-13)


CASES = [
    {},
    {"sinks": True},
    {"group": 1, "n_kv": 1, "dims": (16, 64)},
    {"group": 7, "dims": (24, 80)},
    {"boost": 4.0},
    {"boost": 12.0, "sinks": True},
    {"boost": 40.0},
    {"boost": 200.0, "sinks": True},
    {"boost": -30.0},
]


@SINGLE
@pytest.mark.parametrize("case", CASES, ids=str)
def test_change_is_that_of_really_removing_the_page(op, case):
    step = Step(**case)
    found = step.call(op)
    assert torch.equal(found.change[~step.used], torch.zeros_like(found.change[~step.used]))
    assert torch.equal(found.mass[~step.used], torch.zeros_like(found.mass[~step.used]))
    # a share is as exact as its lse is in float32, and 1 - share at a share of 0.95 twenty times less
    tolerance = 1e-10 if op is reference else 20 * step.rounding
    columns = torch.arange(step.rows.table.shape[1])
    for column in columns.tolist():
        at = step.used[:, column]
        expected = step.without((columns == column).expand(len(at), -1))
        if at.any():
            assert_near(found.change[at, column], expected[at], tolerance)


@SINGLE
@pytest.mark.parametrize("case", CASES[:2] + CASES[5:7], ids=str)
def test_shares_sum_to_one(op, case):
    step = Step(**case)
    total = step.call(op).mass.double().sum(1)
    if step.sinks is not None:
        total += torch.exp(step.sinks.view(1, 2, -1).expand(3, -1, -1).reshape(6, -1) - step.decoded.lse)
    seen = step.decoded.lse > -math.inf
    assert_near(total[seen], torch.ones_like(total[seen]), 1e-4)
    assert not total[~seen].any()


def test_a_heavy_page_keeps_its_digits_in_half_precision():
    """1 - m is 1e-8 and page_values are bfloat16: only the sum over the other pages knows what is left."""
    step = Step(boost=25.0)
    columns = torch.arange(step.rows.table.shape[1])
    heavy, several = columns == 1, step.rows.lengths > 32
    assert (1 - step.decoded.page_lse.sub(step.decoded.lse[:, None]).exp()[several, 1]).max() < 1e-5
    found = step.call(kernel, values=torch.bfloat16).change[several, 1]
    assert_near(found, step.without(heavy.expand(6, -1))[several], 4e-3)


@SINGLE
@pytest.mark.parametrize("sinks", [False, True])
def test_a_page_that_is_all_there_is(op, sinks):
    """Without a sink it changes nothing by definition; with one, what is left is the sink, whose value is 0."""
    step = Step([1, 16], sinks=sinks)
    found = step.call(op).change[:, 0]
    assert_near(found, step.output.norm(dim=-1) if sinks else torch.zeros_like(step.output[..., 0]), 2e-6)


@pytest.mark.parametrize(("boost", "sinks"), [(0.0, True), (40.0, False), (150.0, True), (-150.0, False)])
def test_statistics_of_the_decode_kernel(boost, sinks):
    """All in kernels and float32, also where the weights of all other pages vanish beside one."""
    step = Step([0, 16, 70, 40], group=2, boost=boost, sinks=sinks, stored=torch.float32)
    float_sinks = None if step.sinks is None else step.sinks.float()
    stored = (step.rows.pages, step.rows.table, step.rows.lengths)
    found = decode_kernel(step.query.float(), *stored, scale=1.0, sinks=float_sinks, statistics="values")
    statistics = (found.page_lse, found.page_values, found.output_wide, found.lse, step.rows.lengths, 16)
    change = kernel(*statistics, sinks=float_sinks).change
    columns = torch.arange(step.rows.table.shape[1])
    for column in columns[:3].tolist():
        at, removed = step.used[:, column], (columns == column).expand(4, -1)
        assert_near(change[at, column], step.without(removed)[at], 60 * step.rounding)
        assert_near(joint_kernel(*statistics, removed, sinks=float_sinks), step.without(removed), 60 * step.rounding)


def test_two_runs_are_bitwise_equal():
    step = Step(boost=12.0)
    for first, second in zip(step.call(kernel), step.call(kernel), strict=True):
        assert torch.equal(first, second)


@JOINT
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_joint_change_is_that_of_really_removing_the_set(op, case, share):
    step = Step(**case)
    removed = torch.rand(step.rows.table.shape, generator=step.rows.draw) < share
    tolerance = 1e-10 if op is joint_reference else 4 * step.rounding
    assert_near(step.call(op, removed), step.without(removed), tolerance)


@JOINT
@pytest.mark.parametrize("sinks", [False, True])
def test_joint_change_of_nothing_and_of_everything(op, sinks):
    step = Step(sinks=sinks)
    nothing = torch.zeros(step.rows.table.shape, dtype=torch.bool)
    assert not step.call(op, nothing).any()
    assert_near(step.call(op, ~nothing), step.without(~nothing), 2e-6)
    assert bool(step.call(op, ~nothing).any()) == sinks


@JOINT
def test_a_small_joint_change_keeps_its_digits(op):
    """The set has a share of 1e-7: the outputs with and without it agree in all digits of float32."""
    step = Step([150, 150], boost=-15.0)
    removed = (torch.arange(step.rows.table.shape[1]) == 1).expand(2, -1)
    expected = step.without(removed)
    assert 1e-10 < expected.max() < 1e-6
    found = step.call(op, removed).double()
    assert ((found - expected).abs() / expected).max() < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_lse": torch.zeros(2, 3, 5)}, "page_lse must be"),
        ({"page_lse": torch.zeros(2, 3, 4, dtype=torch.float64)}, "page_lse must be"),
        ({"page_values": torch.zeros(2, 3, 4)}, "page_values must be"),
        ({"page_values": torch.zeros(2, 3, 4, 8, dtype=torch.float64)}, "kernels read"),
        ({"page_values": torch.zeros(2, 3, 8, 4).transpose(2, 3)}, "contiguous"),
        ({"output_wide": torch.zeros(2, 4, 8, dtype=torch.bfloat16)}, "output_wide must be"),
        ({"lse": torch.zeros(8)}, "lse must be"),
        ({"lengths": torch.zeros(2)}, "lengths must be"),
        ({"sinks": torch.zeros(6)}, "6 sinks do not fit"),
        ({"removed": torch.zeros(2, 3)}, "removed must be"),
        ({"lengths": torch.zeros(2, dtype=torch.int32, device="meta")}, "one device"),
    ],
)
def test_bad_input(change, message):
    given = {
        "page_lse": torch.zeros(2, 3, 4), "page_values": torch.zeros(2, 3, 4, 8), "output_wide": torch.zeros(2, 4, 8),
        "lse": torch.zeros(2, 4), "lengths": torch.ones(2, dtype=torch.int32), "page_size": 16,
        "removed": torch.zeros(2, 3, dtype=torch.bool),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        joint_kernel(**{**given, **change})
    if "removed" not in change:
        del given["removed"]
        with pytest.raises(ValueError, match=message):
            kernel(**{**given, **change})


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_compile_cases_name_every_argument(arch):
    cases = compile_cases(arch)
    assert len({case.config for case in cases}) == len(cases)
    for case in cases:
        assert set(case.types) | set(case.constants) == set(case.kernel.arg_names)
        assert not set(case.types) & set(case.constants)
