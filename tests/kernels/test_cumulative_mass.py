"""Column sums of attention: the reference against a brute force of loops, the GPU kernel (interpreted) against it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kvpress_kernels.cumulative_mass import cumulative_mass
from kvpress_kernels.reference import cumulative_mass as module
from kvpress_kernels.reference.cumulative_mass import cumulative_mass as reference


@dataclass(frozen=True)
class Case:
    """Arguments of `cumulative_mass`."""

    query: Tensor
    keys: Tensor
    query_positions: Tensor
    key_positions: Tensor
    scale: float = 0.4
    softcap: float | None = None
    sinks: Tensor | None = None
    debias: bool = False

    def run(self, function=cumulative_mass):
        return function(
            self.query, self.keys, self.query_positions, self.key_positions,
            scale=self.scale, softcap=self.softcap, sinks=self.sinks, debias=self.debias,
        )  # fmt: skip

    def double(self):
        sinks = None if self.sinks is None else self.sinks.double()
        return replace(self, query=self.query.double(), keys=self.keys.double(), sinks=sinks)


def make(seed=0, heads=2, group=2, n_queries=9, n_tokens=9, dim=16, **more):
    """Random inputs; without positions given, query i sits at token i, as in a prompt. Keys are a view amid NaN."""
    draw = torch.Generator().manual_seed(seed)
    buffer = torch.full((heads, n_tokens + 3, dim + 8), float("nan"))
    buffer[:, 1 : n_tokens + 1, :dim] = torch.randn(heads, n_tokens, dim, generator=draw)
    case = Case(
        query=torch.randn(heads, group, n_queries, dim, generator=draw),
        keys=buffer[:, 1 : n_tokens + 1, :dim],
        query_positions=torch.arange(n_queries),
        key_positions=torch.arange(n_tokens),
    )
    return replace(case, **more)


def brute_force(case):
    """One query and token at a time, with Python's exact sums."""
    n_heads, group, n_queries, _ = case.query.shape
    result = torch.zeros(n_heads, group, case.keys.shape[1], dtype=torch.float64)
    viewers = [0] * case.keys.shape[1]
    for u in range(n_queries):
        seen = [i for i, at in enumerate(case.key_positions.tolist()) if at <= int(case.query_positions[u])]
        for i in seen:
            viewers[i] += 1
        for h in range(n_heads):
            for g in range(group):
                logits = [float(case.query[h, g, u].double() @ case.keys[h, i].double()) * case.scale for i in seen]
                if case.softcap is not None:
                    logits = [case.softcap * math.tanh(x / case.softcap) for x in logits]
                every = logits if case.sinks is None else [*logits, float(case.sinks[h, g])]
                total = math.fsum(math.exp(x) for x in every)
                for i, x in zip(seen, logits, strict=True):
                    result[h, g, i] += math.exp(x) / total
    if case.debias:
        for i, count in enumerate(viewers):
            result[:, :, i] /= max(count, 1)
    return result


SINKS = torch.tensor([[0.5, -1.0], [3.0, 0.0]])
VARIANTS = {
    "plain": {},
    "debiased": {"debias": True},
    "sinks": {"sinks": SINKS, "debias": True},
    "softcap": {"softcap": 1.5},
    "gaps": {"key_positions": torch.tensor([0, 3, 4, 9, 10, 20, 21, 22, 40]), "debias": True},
    "unordered": {"query_positions": torch.tensor([8, 0, 3, -1, 5, 5, 2, 100, 1]), "sinks": SINKS},
    "blind": {"query_positions": torch.full((9,), -1), "debias": True},
}


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """torch.empty gives NaN, so that a kernel that reads what it has not written is found out."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_reference_is_the_brute_force(variant):
    case = make(**variant)
    torch.testing.assert_close(case.double().run(reference), brute_force(case), rtol=1e-12, atol=1e-14)


def test_chunks_of_the_reference_do_not_change_it(monkeypatch):
    case = make(debias=True, sinks=SINKS).double()
    whole = case.run(reference)
    for elements in (1, 80):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
        torch.testing.assert_close(case.run(reference), whole, rtol=1e-12, atol=1e-14)


def test_reference_computes_low_precision_in_float32():
    case = make()
    low = replace(case, query=case.query.bfloat16(), keys=case.keys.bfloat16())
    found = low.run(reference)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), brute_force(low), rtol=1e-5, atol=1e-7)


def check(case, limit=2e-6):
    found, expected = case.run(), case.double().run(reference)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert float((found.double() - expected).norm()) <= limit * float(expected.norm())


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_kernel_is_the_reference(variant):
    check(make(**variant))


@pytest.mark.parametrize(
    ("n_tokens", "n_queries", "group", "dim"),
    [(1, 1, 1, 16), (31, 31, 3, 24), (32, 32, 1, 16), (33, 33, 1, 80), (70, 70, 1, 16), (40, 3, 7, 16)],
)
def test_sizes_that_fit_no_tile(n_tokens, n_queries, group, dim):
    positions = torch.arange(n_tokens - n_queries, n_tokens)
    sizes = {"n_tokens": n_tokens, "n_queries": n_queries, "group": group, "dim": dim}
    check(make(heads=1, query_positions=positions, debias=True, **sizes))


def test_queries_in_any_order():
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    check(make(heads=1, group=1, n_tokens=70, n_queries=70, query_positions=order, debias=True))


def test_large_and_constant_logits():
    """Integers, whose products are exact; a logit of 80 itself is known to 4e-6 in float32."""
    draw = torch.Generator().manual_seed(2)
    case = make(scale=0.5)
    keys = torch.randint(-6, 7, case.keys.shape, generator=draw).float()
    large = replace(case, keys=keys, query=torch.randint(-6, 7, case.query.shape, generator=draw).float())
    assert float((0.5 * large.query @ keys[:, None].transpose(2, 3)).abs().max()) > 60
    check(large, limit=1e-5)
    check(replace(case, keys=torch.ones_like(keys), query=torch.full_like(case.query, 10.0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs(dtype):
    case = make()
    check(replace(case, query=case.query.to(dtype), keys=case.keys.to(dtype)))


def test_every_query_hands_out_a_mass_of_one():
    case = make(n_tokens=40, n_queries=40)
    torch.testing.assert_close(case.run().sum(-1), torch.full((2, 2), 40.0))


def test_two_runs_are_equal_bit_by_bit():
    case = make(sinks=SINKS)
    assert torch.equal(case.run(), case.run())


def test_nothing_to_sum():
    case = make()
    none = replace(case, query=case.query[:, :, :0], query_positions=torch.empty(0).long())
    assert torch.equal(none.run(), torch.zeros(2, 2, 9))
    assert replace(case, keys=case.keys[:, :0], key_positions=torch.empty(0).long()).run().shape == (2, 2, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: {"keys": c.keys.double(), "query": c.query.double()}, "float64"),
        (lambda c: {"keys": c.keys.half()}, "one dtype"),
        (lambda c: {"keys": c.keys[:1]}, "do not fit"),
        (lambda c: {"keys": c.keys.transpose(1, 2).contiguous().transpose(1, 2)}, "contiguous"),
        (lambda c: {"query_positions": c.query_positions[:2]}, "one entry for each of 9 queries"),
        (lambda c: {"sinks": torch.zeros(2)}, "sinks"),
        (lambda c: {"keys": c.keys.to("meta")}, "one device"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, words):
    case = make()
    with pytest.raises(ValueError, match=words):
        replace(case, **change(case)).run()
