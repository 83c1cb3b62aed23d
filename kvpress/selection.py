"""From evidence to the kept set: the slots access, ranking, protection, allocation and retention, applied in order.

problem   one sequence in one layer: its units, the proxy queries, what earlier queries left, the budget
scored    the problem with scores [H, U]
decision  the kept tokens of each KV head, with what the report says about them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpress.carried import CarriedStatistics
from kvpress.contract import Contract
from kvpress.errors import ContractError, KvpressError
from kvpress.evidence import Queries, UnitFeatures
from kvpress.slots.access import Aggregate
from kvpress.slots.allocation import Candidates
from kvpress.slots.retention import HeadView

#: name under which the weight of the queries that could see a unit travels with the statistics
EXPOSURE = "exposure"


@dataclass(frozen=True)
class Problem:
    """What is decided: one sequence in one layer.

    queries: the proxy queries at hand (None when the ranking reads none or all are carried); carried: statistics of
    queries that are gone; last_query: the newest query, for eta_proj; n_seen: real tokens so far; budget: tokens per
    KV head; place, n_layers: among the compressed layers.
    """

    features: UnitFeatures
    queries: Queries | None
    carried: CarriedStatistics | None
    last_query: Queries | None
    n_seen: int
    budget: int
    place: int
    n_layers: int


@dataclass(frozen=True)
class Scored:
    """A problem with its scores [H, U], the optional first stage, the mean mass [H, U] and the protected units [H, U].

    law: [H, U] the mass as the access slot smooths and combines it, whatever the ranking makes of it; only where it was asked for.
    """

    problem: Problem
    scores: Tensor
    first_stage: tuple[float, Tensor] | None
    mass: Tensor | None
    protected: Tensor
    law: Tensor | None = None

    @property
    def base(self) -> int:
        """Tokens per KV head beyond the protected ones."""
        return self.problem.budget - int((self.problem.features.sizes * self.protected).sum(1).max())

    @property
    def candidates(self) -> Candidates:
        features = self.problem.features
        n_free = self.base + self.problem.n_seen - self.problem.budget
        return Candidates(self.scores, features.sizes, features.valid & ~self.protected, n_free)


@dataclass(frozen=True)
class Decision:
    """Kept tokens (ascending indices) per KV head, and the measures that the report shows.

    eps_lat: budget tokens per head that the retention could not use; eta_proj: share of the last query's attention
    that is lost (arXiv 2605.08234 eq. 7), mean over query heads; output_change: |o without the evicted - o| / |o| of
    that query, exact for the whole evicted set, mean over query heads; kept_mass: kept share of the evidence mass, None
    when the ranking measures none; ties: unkept units whose score equals the lowest kept score.
    """

    kept: list[Tensor]
    eps_lat: list[int]
    eta_proj: float | None
    output_change: float | None
    kept_mass: float | None
    ties: int


def evidence_statistics(contract: Contract, problem: Problem) -> dict[str, Tensor]:
    """Statistics [H, G, U] of the queries at hand and of those carried, before any access step."""
    access, names = _aggregate(contract), contract.ranking.statistics
    features = problem.features
    if problem.queries is None:
        shape = (features.n_heads, features.spec.group, features.n_units)
        wanted = [*names, EXPOSURE] if access.debias else names
        found = {name: torch.zeros(shape, device=features.starts.device) for name in wanted}
    else:
        in_output_space = contract.ranking.space == "output"
        found = features.statistics(problem.queries, names, access.fresh_reducer, in_output_space)
        if access.debias:
            found[EXPOSURE] = exposure_counts(features, problem.queries).contiguous()
    if problem.carried is not None:
        found = problem.carried.merge_into(found, features, access.query_reducer)
    return found


def total_weight(problem: Problem) -> float:
    """Sum of the weights of all queries that count, carried ones included."""
    weight = 0.0 if problem.queries is None else float(problem.queries.weights.sum())
    return weight + (problem.carried.weight if problem.carried is not None else 0.0)


def score(contract: Contract, problem: Problem, with_law: bool = False) -> Scored:
    """Score every unit of every KV head.

    with_law: also what an observer wants to know (`Scored.law`).

    Raises:
        ContractError: the budget is smaller than the protection, or keeps nothing.
        KvpressError: a score is not a number.
    """
    features = problem.features
    protected = _protected(contract, problem)
    scores, first_stage, mass, law = _scores(contract, problem, protected, with_law)
    if bool((~torch.isfinite(scores) & features.valid).any()):
        raise KvpressError(
            f"layer {features.layer}: ranking '{contract.ranking.kind}' gave a score that is no finite number; "
            f"check the model's weights and dtype (float16 overflows where bfloat16 does not)"
        )
    scored = Scored(problem, scores, first_stage, mass, protected, law)
    if scored.base < 0:
        raise ContractError(
            f"contract '{contract.name}': the budget of {problem.budget} tokens per head is smaller than the "
            f"protection of {problem.budget - scored.base}: raise the budget, or protect fewer tokens"
        )
    if problem.budget < 1:
        raise ContractError(
            f"contract '{contract.name}': the budget keeps none of {problem.n_seen} tokens: raise the budget"
        )
    return scored


def decide(contract: Contract, layers: Sequence[Scored]) -> list[Decision]:
    """Decide one sequence, for one layer or (scope or allocation over the model) for all layers at once."""
    layers = combined(contract, layers)
    base = min(layer.base for layer in layers)
    if contract.allocation.needs_all_layers:
        budgets = contract.allocation.model(base, [layer.candidates for layer in layers])
    else:
        budgets = [contract.allocation.layer(base, s.candidates, s.problem.place, s.problem.n_layers) for s in layers]
    return [_retain(contract, scored, budget) for scored, budget in zip(layers, budgets, strict=True)]


def combined(contract: Contract, layers: Sequence[Scored]) -> list[Scored]:
    """Under scope `model` every layer with the scores, and the law, that all of them share; else as they are."""
    access = _aggregate(contract)
    if access.scope != "model":
        return list(layers)

    def common(parts: Sequence[Tensor]) -> Tensor:
        return access.combine_layers([part[0] for part in parts])

    scores = common([layer.scores for layer in layers])
    laws = [layer.law for layer in layers if layer.law is not None]
    law = common(laws) if laws else None
    return [
        replace(
            layer,
            scores=scores.to(layer.scores.device).expand_as(layer.scores),
            law=None if law is None else law.to(layer.scores.device).expand_as(layer.scores),
        )
        for layer in layers
    ]


def _retain(contract: Contract, scored: Scored, budgets: Sequence[int]) -> Decision:
    features, candidates = scored.problem.features, scored.candidates
    kept_tokens, unused, ties, units_kept = [], [], 0, torch.zeros_like(features.valid)
    for head, budget in enumerate(budgets):
        eligible = candidates.eligible[head]
        available = int((features.sizes[head] * eligible).sum())
        view = _head_view(contract, scored, head)
        units = eligible.clone() if available <= budget else contract.retention.units(view, budget)
        used = int((features.sizes[head] * units).sum())
        tokens = features.token_mask(head, units | scored.protected[head])
        left = min(budget, available) - used
        fill = contract.retention.fill(view, units, left) if left > 0 else None
        if fill is not None:
            tokens, left = tokens | fill, left - int(fill.sum())
        kept_tokens.append(tokens.nonzero().flatten())
        unused.append(left)
        units_kept[head] = units
        rest = eligible & ~units
        if bool(units.any()) and bool(rest.any()):
            ties += int((scored.scores[head][rest] == scored.scores[head][units].min()).sum())
    kept_mass = None
    if scored.mass is not None and float(scored.mass.sum()) > 0:
        share = (scored.mass * (units_kept | scored.protected)).sum() / scored.mass.sum()
        kept_mass = float(share)
    return Decision(kept_tokens, unused, *_last_query_loss(scored.problem, kept_tokens), kept_mass, ties)


def _scores(
    contract: Contract, problem: Problem, protected: Tensor, with_law: bool = False
) -> tuple[Tensor, tuple[float, Tensor] | None, Tensor | None, Tensor | None]:
    access, ranking, features = _aggregate(contract), contract.ranking, problem.features
    pooled = mass = law = None
    if ranking.statistics:
        statistics = evidence_statistics(contract, problem)
        counts = statistics.pop(EXPOSURE, torch.ones(()))
        if access.query_reducer == "mean":
            weight = max(total_weight(problem), torch.finfo(torch.float32).tiny)
            statistics = {name: value / weight for name, value in statistics.items()}

        def through_access(exposure: Tensor) -> Tensor:
            if access.debias:
                exposure = exposure / counts.clamp(min=1e-12)
            return access.reduce_heads(access.smooth(exposure, features.valid & ~protected), 1)

        pooled = through_access(ranking.exposure(statistics, features))
        mass = statistics["mass"].mean(1)
        law = through_access(statistics["mass"]) if with_law else None
    scores = ranking.weigh(pooled, features)
    first_stage = ranking.first_stage(pooled)
    if access.scope != "head":
        scores = access.reduce_heads(scores, 0).expand_as(scores)
        law = None if law is None else access.reduce_heads(law, 0).expand_as(law)
        if first_stage is not None:
            share, first = first_stage
            first_stage = share, access.reduce_heads(first, 0).expand_as(first)
    return scores, first_stage, mass, law


def _head_view(contract: Contract, scored: Scored, head: int) -> HeadView:
    problem, features = scored.problem, scored.problem.features

    def group_scores(count: int) -> Tensor:
        assert problem.queries is not None
        used = problem.queries.subset(problem.queries.weights > 0)
        chunks = torch.arange(used.positions.numel()).tensor_split(max(1, min(count, used.positions.numel())))
        parts = []
        for chunk in chunks:
            chosen = torch.zeros(used.positions.numel(), dtype=torch.bool, device=used.weights.device)
            chosen[chunk] = True
            one = replace(problem, queries=used.subset(chosen), carried=None)
            parts.append(_scores(contract, one, scored.protected)[0][head])
        return torch.stack(parts)

    def vectors(count: int) -> tuple[Tensor, Tensor, Tensor]:
        assert problem.queries is not None
        used = problem.queries.subset(problem.queries.weights > 0)
        last = Queries(used.vectors[:, :, -count:], used.positions[-count:], used.weights[-count:])
        mass, shift = features.vectors(head, last)
        return last.weights.to(mass.dtype).repeat(features.spec.group), mass, shift

    def token_scores() -> tuple[Tensor, Tensor]:
        tokens = UnitFeatures(features.spec, features.groups, 1)
        shield = torch.zeros_like(tokens.valid)
        for index, units in enumerate(scored.protected):
            mask = features.token_mask(index, units)
            shield[index, : mask.numel()] = mask
        scores = _scores(contract, replace(problem, features=tokens, carried=None), shield)[0][head]
        positions = features.head(head)[0].positions
        units = torch.searchsorted(features.starts[head][features.valid[head]].contiguous(), positions, right=True) - 1
        return scores[: positions.numel()], units

    eligible = features.valid[head] & ~scored.protected[head]
    first = None if scored.first_stage is None else (scored.first_stage[0], scored.first_stage[1][head])
    return HeadView(
        scored.scores[head],
        features.sizes[head],
        eligible,
        features.block_size,
        first,
        group_scores,
        vectors,
        token_scores,
    )


def _protected(contract: Contract, problem: Problem) -> Tensor:
    """[H, U]: units with a protected token; a block is protected as a whole, because it is stored as a whole."""
    return problem.features.units_with(lambda at: contract.protection.mask(at, problem.n_seen, problem.budget))


def exposure_counts(features: UnitFeatures, queries: Queries) -> Tensor:
    """[H, G, U] weight of the queries that could see the unit's first token (T - i for cumulative attention)."""
    order = queries.positions.argsort()
    positions, weights = queries.positions[order].contiguous(), queries.weights[order]
    later = torch.cat([weights.flip(0).cumsum(0).flip(0), weights.new_zeros(1)])  # weight at or behind each position
    counts = later[torch.searchsorted(positions, features.starts.contiguous())]
    return counts.float()[:, None].expand(-1, features.spec.group, -1)


def _last_query_loss(problem: Problem, kept: Sequence[Tensor]) -> tuple[float | None, float | None]:
    """`eta_proj` and `output_change` of a decision, None where no query was seen."""
    if problem.last_query is None:
        return None, None
    losses = [problem.features.loss(head, problem.last_query, index) for head, index in enumerate(kept)]
    missed, change = (torch.stack(part).mean() for part in zip(*losses, strict=True))
    return float(missed), float(change)


def _aggregate(contract: Contract) -> Aggregate:
    assert isinstance(contract.access, Aggregate)
    return contract.access


__all__ = ["Decision", "Problem", "Scored", "decide", "evidence_statistics", "score", "total_weight"]
