"""Combinations of choices that cannot work, refused when a contract is built, each with its reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvpress.errors import ContractError
from kvpress.slots.access import Aggregate
from kvpress.slots.budget import Fraction
from kvpress.slots.query_law import FirstDecodeSteps, TailAnchors
from kvpress.slots.schedule import AfterDecodeSteps, EndOfPrefill, PerPrefillChunk

if TYPE_CHECKING:
    from kvpress.contract.contract import Contract


def check_combination(contract: Contract) -> None:
    """Raise ContractError with one sentence if the choices of `contract` exclude each other."""
    for problem in (
        _schedule(contract),
        _units(contract),
        _queries(contract),
        _scope(contract),
    ):
        if problem:
            raise ContractError(f"contract '{contract.name}': {problem}")


def _schedule(c: Contract) -> str | None:
    law, schedule = c.query_law, c.schedule
    if isinstance(law, FirstDecodeSteps) and not (isinstance(schedule, AfterDecodeSteps) and schedule.n == law.n):
        return (
            f"query_law 'first_decode_steps' with n={law.n} needs schedule 'after_decode_steps' with the same n, "
            f"because those queries do not exist earlier"
        )
    if law.origin in ("reconstruction", "oracle") and not isinstance(schedule, EndOfPrefill):
        return f"query_law '{law.kind}' reads the full cache once, so it needs schedule 'end_of_prefill', not '{schedule.kind}'"
    if isinstance(law, TailAnchors) and law.anchors and not law.spans and not isinstance(schedule, EndOfPrefill):
        return (
            "query_law 'tail_anchors' spreads its anchors over the tokens seen so far, and the queries at new places are "
            f"gone under schedule '{schedule.kind}': give 'spans', or anchors 0"
        )
    if isinstance(schedule, PerPrefillChunk) and (c.allocation.needs_all_layers or _scope_of(c) == "model"):
        return (
            "schedule 'per_prefill_chunk' cuts each layer at once, but this allocation or scope needs all layers first"
        )
    return None


def _units(c: Contract) -> str | None:
    blocks = c.granularity.block_size > 1
    if blocks and not c.retention.for_blocks:
        return f"retention '{c.retention.kind}' picks single tokens: with granularity 'block' use 'strict_blocks' or 'blocks_token_fill'"
    if not blocks and not c.retention.for_tokens:
        return (
            f"retention '{c.retention.kind}' picks blocks: give granularity {{kind: block, size: 16}}, or use 'top_k'"
        )
    return None


def _queries(c: Contract) -> str | None:
    if c.retention.needs_queries:
        if not c.ranking.statistics:
            return f"retention '{c.retention.kind}' weighs queries, but ranking '{c.ranking.kind}' uses none"
        if c.query_law.cumulative:
            return (
                f"retention '{c.retention.kind}' looks at single queries again, but query_law '{c.query_law.kind}' "
                f"only adds them up: use 'tail' or 'tail_anchors'"
            )
    if c.retention.kind == "blocks_token_fill" and c.ranking.statistics and c.query_law.cumulative:
        return (
            f"retention 'blocks_token_fill' scores tokens from the queries again, but query_law '{c.query_law.kind}' "
            f"only adds them up per block: use 'tail' or 'tail_anchors'"
        )
    if isinstance(c.access, Aggregate) and not c.ranking.statistics:
        if c.access.debias:
            return f"access 'debias' divides by query counts, but ranking '{c.ranking.kind}' uses no queries"
        if c.access.pooling != "none":
            return (
                f"access 'pooling' smooths attention, but ranking '{c.ranking.kind}' uses none: leave pooling at 'none'"
            )
    if isinstance(c.access, Aggregate) and c.access.query_reducer == "max" and c.query_law.kind == "tail_anchors":
        return "query_reducer 'max' ignores the weights that are the point of query_law 'tail_anchors'"
    return None


def _scope_of(c: Contract) -> str:
    return c.access.scope if isinstance(c.access, Aggregate) else "head"


def _scope(c: Contract) -> str | None:
    scope = _scope_of(c)
    if scope != "head" and c.allocation.kind not in ("uniform", "pyramid"):
        return f"access scope '{scope}' gives heads the same scores, so allocation '{c.allocation.kind}' has nothing to divide"
    if scope == "model" and c.allocation.kind != "uniform":
        return "access scope 'model' keeps one set in all layers, which needs allocation 'uniform'"
    if scope == "model" and getattr(c.ranking, "of", c.ranking).kind == "criticalkv":
        return "ranking 'criticalkv' has two stages, which scope 'model' cannot add up over layers: use scope 'head' or 'layer'"
    if scope != "head" and c.retention.kind in ("greedy_set", "grouped_reserve"):
        return f"retention '{c.retention.kind}' decides per KV head: use access scope 'head'"
    if scope == "model" and c.retention.kind == "blocks_token_fill":
        return "retention 'blocks_token_fill' scores tokens per KV head: use access scope 'head' or 'layer'"
    if c.budget.keeps_everything and isinstance(c.budget, Fraction) and c.schedule.kind == "every_decode_steps":
        return "a budget of 100 % of the prompt with schedule 'every_decode_steps' would only trim the answer: give a budget below 1"
    return None
