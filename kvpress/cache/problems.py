"""What a decision reads of one layer: its stored tokens as units, the evidence, and the budget in tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvpress.errors import ContractError
from kvpress.evidence import UnitFeatures
from kvpress.selection import Problem
from kvpress.slots.budget import Bytes, Fraction

if TYPE_CHECKING:
    from kvpress.cache.layer import CompressedLayer


def features(layer: CompressedLayer, row: int, limit: int) -> UnitFeatures:
    """The stored tokens of one row in columns before `limit`, as units."""
    assert layer.spec is not None
    plan = layer.plan
    shared = None if plan.shared is None else plan.shared.reader(row, limit, plan.clock)
    return UnitFeatures(layer.spec, layer.storage.groups(row, limit), plan.contract.granularity.block_size, shared)


def problems(layer: CompressedLayer, limit: int) -> list[Problem]:
    """One decision per row over the tokens in columns before `limit`."""
    plan, storage, found = layer.plan, layer.storage, list[Problem]()
    ragged = len({pair for form in plan.formats for pair in form.ranks((0, 0), 1)}) > 1
    if isinstance(plan.contract.budget, Bytes) and ragged and plan.contract.allocation.kind != "uniform":
        raise ContractError(
            f"contract '{plan.contract.name}': a budget in bytes cannot be kept where heads have ranks of their own and allocation "
            f"'{plan.contract.allocation.kind}' gives them different lengths: use allocation 'uniform', equal ranks, or a budget in tokens"
        )
    unit = storage.packing.unit(even=plan.contract.allocation.kind == "uniform")
    for row in range(storage.n_rows):
        n_prompt = storage.real_tokens(row, plan.prompt_length or limit)
        if not isinstance(plan.contract.budget, Fraction):  # an absolute budget also holds the answer
            n_prompt = max(n_prompt, storage.real_tokens(row, limit))
        budget = plan.contract.budget.tokens_per_head(n_prompt, plan.n_heads_total, unit)
        evidence, n_seen = layer.evidence.of_row(layer, row, limit), storage.real_tokens(row, limit)
        units = features(layer, row, limit)
        found.append(Problem(units, *evidence, n_seen, budget, layer.place, plan.n_layers))
    return found
