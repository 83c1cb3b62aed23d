"""The GPU kernels of `window_scores`, in Triton's interpreter, against the plain torch reference in float64.

The reference itself is compared with a brute force that really removes units in test_window_scores.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvpress_kernels import window_attention
from kvpress_kernels import window_scores as module
from kvpress_kernels.reference.window_scores import attention_probs
from kvpress_kernels.reference.window_scores import window_scores as reference
from kvpress_kernels.window_scores import window_scores
from kvpress_kernels.window_tokens import query_tiles

ALL = ("mass", "mass_squared", "coverage", "change@0", "change@1", "change@0.5")
SOME = ("mass", "change@1")


@dataclass(frozen=True)
class Case:
    """Arguments of `window_scores`."""

    query: Tensor
    keys: Tensor
    values: Tensor
    query_positions: Tensor
    key_positions: Tensor
    weights: Tensor
    scale: float = 0.2
    unit_slots: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    basis: Tensor | None = None

    def run(self, reducer="sum", statistics=ALL, function=window_scores):
        return function(
            self.query, self.keys, self.values, self.query_positions, self.key_positions, self.weights,
            scale=self.scale, statistics=statistics, unit_slots=self.unit_slots, reducer=reducer,
            softcap=self.softcap, sinks=self.sinks, value_basis=self.basis,
        )  # fmt: skip

    def expected(self, reducer="sum", statistics=ALL):
        """The reference's results in float64."""
        wide = {
            name: getattr(self, name).double()
            for name in ("query", "keys", "values", "weights", "sinks", "basis")
            if getattr(self, name) is not None
        }
        return replace(self, **wide).run(reducer, statistics, reference)


def make(seed=0, heads=1, group=2, n_queries=5, n_tokens=40, key_dim=16, value_dim=16, blocks=None, **more):
    """Random inputs whose queries sit in the last positions; keys and values are views with NaN all around them."""
    draw = torch.Generator().manual_seed(seed)

    def view(dim):
        buffer = torch.full((heads, n_tokens + 3, dim + 8), float("nan"))
        buffer[:, 1 : n_tokens + 1, :dim] = torch.randn(heads, n_tokens, dim, generator=draw)
        return buffer[:, 1 : n_tokens + 1, :dim]

    slots = None
    if blocks is not None:
        slots = torch.arange(-(-n_tokens // blocks) * blocks).view(-1, blocks)
        slots = torch.where(slots < n_tokens, slots, -1)
    case = Case(
        query=torch.randn(heads, group, n_queries, key_dim, generator=draw),
        keys=view(key_dim),
        values=view(value_dim),
        query_positions=torch.arange(n_tokens - n_queries, n_tokens),
        key_positions=torch.arange(n_tokens),
        weights=torch.rand(n_queries, generator=draw, dtype=torch.float64) + 0.1,
        unit_slots=slots,
    )
    return replace(case, **more)


def check(case, reducer="sum", limit=2e-6, statistics=ALL):
    found, expected = case.run(reducer, statistics), case.expected(reducer, statistics)
    assert list(found) == list(statistics)
    for name in statistics:
        assert found[name].dtype == torch.float32
        assert found[name].shape == expected[name].shape
        error = (found[name].double() - expected[name]).norm() / expected[name].norm().clamp(min=1e-30)
        assert float(error) <= limit, f"{name}: relative error {float(error):.1e}"


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """torch.empty gives NaN, so that a kernel that reads what it has not written is found out."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("blocks", [None, 8], ids=["tokens", "blocks"])
@pytest.mark.parametrize("reducer", ["sum", "max"])
def test_every_statistic(blocks, reducer):
    check(make(heads=2, blocks=blocks), reducer)


@pytest.mark.parametrize(
    ("n_tokens", "n_queries", "group", "key_dim", "value_dim"),
    [(1, 1, 1, 16, 16), (2, 1, 3, 24, 16), (31, 3, 1, 16, 24), (32, 16, 2, 16, 16), (33, 17, 1, 80, 40), (70, 4, 7, 24, 20)],
)  # fmt: skip
@pytest.mark.parametrize("blocks", [None, 9], ids=["tokens", "blocks"])
def test_sizes_that_fit_no_tile(n_tokens, n_queries, group, key_dim, value_dim, blocks):
    sizes = {"n_tokens": n_tokens, "n_queries": n_queries, "group": group, "key_dim": key_dim, "value_dim": value_dim}
    check(make(blocks=blocks, **sizes), statistics=("coverage", "change@0.5"), limit=4e-6)


def test_units_longer_than_a_tile_and_units_with_gaps():
    check(make(n_tokens=90, blocks=37))
    gaps = torch.tensor([[0, 3, -1], [-1, 1, -1], [39, 4, 6], [8, -1, 9], [-1, -1, -1]])  # in no order, tokens in none
    check(make(unit_slots=gaps))
    check(make(unit_slots=gaps, query_positions=torch.tensor([1, 3, 9, 8, 5])), limit=1e-5, statistics=SOME)


@pytest.mark.parametrize("blocks", [None, 8], ids=["tokens", "blocks"])
def test_sinks_softcap_and_basis(blocks):
    draw = torch.Generator().manual_seed(1)
    sinks = torch.tensor([[0.5, -1.0], [3.0, 0.0]])
    basis = torch.randn(2, 2, 16, 20, generator=draw)
    check(make(heads=2, blocks=blocks, sinks=sinks, softcap=1.5), statistics=SOME)
    check(make(heads=2, blocks=blocks, sinks=sinks, basis=basis), "max", statistics=("change@0",))


def test_long_contexts_are_attended_in_chunks():
    case = make(group=1, n_queries=2, n_tokens=300)
    assert window_attention.n_processors(case.keys.device) >= 4
    check(case, statistics=SOME)
    check(replace(case, query_positions=torch.tensor([20, 299])), statistics=SOME)


@pytest.mark.parametrize("blocks", [None, 8], ids=["tokens", "blocks"])
def test_queries_anywhere_and_positions_with_gaps(blocks):
    positions = torch.arange(40) * 3 + 5
    case = make(blocks=blocks, key_positions=positions, query_positions=torch.tensor([124, 70, 6, 4, 1000]))
    for reducer in ("sum", "max"):
        check(case, reducer, limit=1e-5, statistics=("coverage", "change@1"))


@pytest.mark.parametrize("blocks", [None, 8], ids=["tokens", "blocks"])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_that_see_nothing_give_zeros(blocks, with_sinks):
    sinks = torch.zeros(1, 2) if with_sinks else None
    case = make(blocks=blocks, sinks=sinks, query_positions=torch.full((5,), -1))
    assert all(bool((value == 0).all()) for value in case.run().values())
    mixed = replace(case, query_positions=torch.tensor([-1, 30, 3, -1, 39]))
    check(mixed, "max", limit=1e-5, statistics=SOME)


@pytest.mark.parametrize("blocks", [None, 8], ids=["tokens", "blocks"])
def test_queries_of_weight_zero_are_skipped(blocks):
    """Also where such a query holds garbage: it is not evidence at all."""
    case = make(blocks=blocks, sinks=torch.zeros(1, 2))
    weights = case.weights.clone()
    weights[1] = 0
    query = case.query.clone()
    query[:, :, 1] = float("nan")
    for reducer in ("sum", "max"):
        check(replace(case, weights=weights, query=query), reducer, statistics=SOME)


@pytest.mark.parametrize("blocks", [None, 4], ids=["tokens", "blocks"])
def test_a_unit_that_is_all_a_query_sees_has_no_output_change(blocks):
    case = make(n_queries=1, query_positions=torch.tensor([0]), blocks=blocks)
    found = case.run()
    assert float(found["mass"].max()) == pytest.approx(float(case.weights[0]))
    assert all(float(found[name].abs().max()) == 0 for name in ("coverage", "change@0", "change@0.5", "change@1"))


@pytest.mark.parametrize("gap", [3.0, 14.0, 40.0])
@pytest.mark.parametrize("blocks", [None, 4], ids=["tokens", "blocks"])
def test_a_unit_that_holds_nearly_all_mass(gap, blocks):
    """1 - a runs from 1e-1 to 1e-17, for two of three queries, and not on the same unit."""
    case = make(seed=7, n_queries=3, n_tokens=20, blocks=blocks, scale=1.0)
    keys, query = case.keys.clone(), 0.1 * case.query
    keys[:, :, :2], query[..., :2] = 0.0, 0.0
    query[:, :, 0, 0] = query[:, :, 2, 1] = 1.0
    keys[:, 1, 0] = keys[:, 9, 1] = gap + 3
    case = replace(case, keys=keys, query=query)
    asked = ("change@0", "change@0.5", "change@1")
    check(
        case, "max", limit=4e-5, statistics=asked
    )  # the reference in float32 is as far away where a is just below 0.95
    check(replace(case, sinks=torch.tensor([[0.5, 9.0]])), limit=4e-5, statistics=asked)
    if gap >= 20:
        best = case.run(statistics=SOME)["change@1"].topk(2).indices.sort().values
        assert bool((best == torch.tensor([1, 9] if blocks is None else [0, 2])).all())


def test_dominant_units_in_another_basis():
    draw = torch.Generator().manual_seed(1)
    case = make(seed=7, n_queries=3, n_tokens=20, scale=1.0, basis=torch.randn(1, 2, 16, 12, generator=draw))
    keys, query = case.keys.clone(), case.query.clone()
    keys[:, :, 0], query[..., 0] = 0.0, 1.0
    keys[:, 4, 0] = 12.0
    check(replace(case, keys=keys, query=query), limit=2e-5, statistics=("change@0", "change@1"))


@pytest.mark.parametrize("blocks", [None, 8], ids=["tokens", "blocks"])
def test_a_large_part_that_all_values_share_costs_no_accuracy(blocks):
    case = make(blocks=blocks)
    check(replace(case, values=case.values + 1000.0), limit=1e-3, statistics=SOME)


@pytest.mark.parametrize("blocks", [None, 8], ids=["tokens", "blocks"])
def test_large_and_constant_logits(blocks):
    """Logits of -80 to 80 from integers, whose products are exact, and logits that are all the same."""
    draw = torch.Generator().manual_seed(2)
    case = make(blocks=blocks, scale=0.5)
    whole = torch.randint(-6, 7, case.keys.shape, generator=draw).float()
    large = replace(case, keys=whole, query=torch.randint(-6, 7, case.query.shape, generator=draw).float())
    logits = large.scale * large.query @ large.keys[:, None].transpose(2, 3)
    assert float(logits.abs().max()) > 80
    check(large, limit=1e-5, statistics=SOME)  # a logit of 80 itself is known to 4e-6
    same = replace(case, keys=torch.ones_like(whole), query=torch.full_like(case.query, 10.0))
    check(same, statistics=SOME)
    assert float(same.run()["coverage"].max()) == 0  # no unit has more than its share


@pytest.mark.parametrize("blocks", [None, 8], ids=["tokens", "blocks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs(blocks, dtype):
    case = make(blocks=blocks)
    case = replace(
        case, query=case.query.to(dtype), keys=case.keys.to(dtype), values=case.values.to(dtype), weights=case.weights.float()
    )  # fmt: skip
    # over tokens, the output is rounded to the dtype of the values
    check(case, limit=5e-3 if blocks is None else 4e-6, statistics=("mass", "change@1"))


def test_views_of_a_batch_with_heads_inside():
    """[B, n, H, D] memory, as projections leave it: tokens are far apart, and nothing is copied."""
    draw = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 40, 2, 16, generator=draw).transpose(1, 2)  # each [H, n, D]
    query = torch.randn(2, 5, 2, 16, generator=draw).transpose(1, 2)
    check(replace(make(), keys=keys, values=values, query=query), statistics=SOME)


def test_many_queries_skip_what_they_cannot_see(monkeypatch):
    monkeypatch.setattr(module, "MANY_QUERIES", 1)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(4))
    for positions, reducer in ((torch.arange(70), "sum"), (order, "max")):
        case = make(group=2 if reducer == "sum" else 1, n_tokens=70, n_queries=70, query_positions=positions)
        check(case, reducer, limit=1e-5, statistics=SOME)


@pytest.mark.parametrize("reducer", ["sum", "max"])
def test_looking_at_a_few_queries_at_a_time_changes_nothing(monkeypatch, reducer):
    draw = torch.Generator().manual_seed(1)
    case = make(basis=torch.randn(1, 2, 16, 20, generator=draw))
    monkeypatch.setattr(module, "OUTPUT_ELEMENTS", 2 * 16 * 2)  # two of five queries
    check(case, reducer, statistics=SOME)
    check(replace(case, basis=None), reducer, statistics=SOME)


def test_tiles_of_queries_that_see_something():
    first, end = query_tiles(torch.arange(1, 101, dtype=torch.int32), 100, 32, 16)
    assert first.tolist() == [0, 2, 4, 6]
    assert end.tolist() == [7, 7, 7, 7]
    first, end = query_tiles(torch.tensor([100, 0, 40, 0], dtype=torch.int32), 100, 32, 1)
    assert first.tolist() == [0, 0, 0, 0]
    assert end.tolist() == [3, 3, 1, 1]
    first, end = query_tiles(torch.zeros(4, dtype=torch.int32), 40, 32, 2)
    assert bool((first >= end).all())


@pytest.mark.parametrize("blocks", [None, 8], ids=["tokens", "blocks"])
def test_two_runs_are_equal_bit_by_bit(blocks):
    case = make(blocks=blocks, scale=4.0)
    first, second = case.run(statistics=SOME), case.run(statistics=SOME)
    assert all(torch.equal(first[name], second[name]) for name in SOME)


def test_only_what_is_asked_for():
    case = make()
    every = case.run()
    for name in ("mass_squared", "coverage", "change@0.5"):
        found = case.run(statistics=(name,))
        assert list(found) == [name]
        assert torch.equal(found[name], every[name])
    assert case.run(statistics=()) == {}


def test_nothing_to_score():
    case = make()
    none = replace(case, query=case.query[:, :, :0], query_positions=torch.empty(0).long(), weights=torch.empty(0))
    assert all(value.shape == (1, 2, 40) and bool((value == 0).all()) for value in none.run().values())
    empty = replace(case, keys=case.keys[:, :0], values=case.values[:, :0], key_positions=torch.empty(0).long())
    assert all(value.shape == (1, 2, 0) for value in empty.run().values())


class NoSynchronisation(TorchDispatchMode):
    """Refuses what would wait for a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique_dim"), (
            name
        )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("blocks", [None, 8], ids=["tokens", "blocks"])
def test_nothing_waits_for_the_device(blocks):
    case = make(blocks=blocks, sinks=torch.zeros(1, 2))
    with NoSynchronisation():
        case.run(statistics=SOME)
        case.run("max", SOME)
        with pytest.raises(AssertionError):
            case.run(function=reference)


def test_sums_of_mass_are_the_attention_of_the_reference():
    case = make(n_queries=1, weights=torch.ones(1))
    probs = attention_probs(
        case.query, case.keys.contiguous(), case.query_positions, case.key_positions, case.scale, None, None
    )
    torch.testing.assert_close(case.run(statistics=("mass",))["mass"], probs[:, :, 0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: {"keys": c.keys.double()}, "keys is torch.float64"),
        (lambda c: {"keys": c.keys.half()}, "one dtype"),
        (lambda c: {"query": c.query[0]}, "must be"),
        (lambda c: {"values": c.values[:, :3]}, "do not fit"),
        (lambda c: {"keys": c.keys.transpose(1, 2).contiguous().transpose(1, 2)}, "contiguous"),
        (lambda c: {"weights": c.weights[:2]}, "one entry for each of 5 queries"),
        (lambda c: {"key_positions": c.key_positions[:2]}, "one entry for each of 40 tokens"),
        (lambda c: {"unit_slots": torch.arange(4)}, "unit_slots"),
        (lambda c: {"sinks": torch.zeros(2)}, "sinks"),
        (lambda c: {"basis": torch.zeros(1, 2, 3, 4)}, "value_basis"),
        (lambda c: {"keys": c.keys.to("meta")}, "one device"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, words):
    case = make()
    with pytest.raises(ValueError, match=words):
        replace(case, **change(case)).run()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown statistic 'masses'"):
        make().run(statistics=("masses",))
    with pytest.raises(ValueError, match="reducer"):
        make().run(reducer="mean")
