"""Slot `retention`: from scores and a budget to the kept set of one KV head.

All choices work on the units that are not protected and spend at most `budget` tokens. Ties go to the earlier unit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvpress.slots.base import Choice


@dataclass(frozen=True)
class HeadView:
    """What a retention rule sees of one KV head.

    scores [U], sizes [U] tokens, eligible [U] bool, block_size; first_stage: (share, scores [U]) or None.
    group_scores(m): [m, U] scores of m groups of proxy queries. vectors(n): weights [P], mass [P, U] and
    displacement g [P, U, Dv] of the last n proxy queries. token_scores(): [N] scores of single tokens with the unit
    index [N] of each.
    """

    scores: Tensor
    sizes: Tensor
    eligible: Tensor
    block_size: int
    first_stage: tuple[float, Tensor] | None
    group_scores: Callable[[int], Tensor]
    vectors: Callable[[int], tuple[Tensor, Tensor, Tensor]]
    token_scores: Callable[[], tuple[Tensor, Tensor]]


class Retention(Choice, slot="retention"):
    """Base of the retention rules."""

    #: rules that look at single queries again need a law whose queries are at hand when the cache is cut
    needs_queries: ClassVar[bool] = False
    for_tokens: ClassVar[bool] = True
    for_blocks: ClassVar[bool] = True

    def units(self, view: HeadView, budget: int) -> Tensor:
        """[U] bool: units to keep beside the protected ones, at most `budget` tokens."""
        raise NotImplementedError

    def fill(self, view: HeadView, kept: Tensor, left: int) -> Tensor | None:
        """[N] bool: single tokens that use up what whole units left over, or None."""
        return None


def best(scores: Tensor, eligible: Tensor, count: int) -> Tensor:
    """Mask [U] of the `count` best eligible units, earlier ones on ties."""
    mask = torch.zeros_like(eligible)
    count = min(count, int(eligible.sum()))
    if count > 0:
        ranked = scores.masked_fill(~eligible, -torch.inf).argsort(descending=True, stable=True)
        mask[ranked[:count]] = True
    return mask


def staged_best(view: HeadView, count: int) -> Tensor:
    """`best`, after a first stage by other scores where the ranking has one (CriticalKV)."""
    if view.first_stage is None:
        return best(view.scores, view.eligible, count)
    share, scores = view.first_stage
    first = best(scores, view.eligible, int(share * count + 1e-9))
    return first | best(view.scores, view.eligible & ~first, count - int(first.sum()))


class TopK(Retention, kind="top_k"):
    """The k best tokens."""

    source: ClassVar[str] = "arXiv 2605.08234 eq. 1"
    for_blocks: ClassVar[bool] = False

    def units(self, view: HeadView, budget: int) -> Tensor:
        return staged_best(view, budget)


class StrictBlocks(Retention, kind="strict_blocks"):
    """The floor(k / p) best whole blocks; what is left of the budget stays unused (eps_lat)."""

    source: ClassVar[str] = "arXiv 2605.08234 eq. 12"
    for_tokens: ClassVar[bool] = False

    def units(self, view: HeadView, budget: int) -> Tensor:
        return staged_best(view, budget // view.block_size)


class BlocksTokenFill(StrictBlocks, kind="blocks_token_fill"):
    """Strict blocks, then single tokens by their own score of the same ranking until the budget is spent."""

    source: ClassVar[str] = "arXiv 2605.08234 section 2, Fig. 4 (token-fill)"

    def fill(self, view: HeadView, kept: Tensor, left: int) -> Tensor | None:
        scores, unit_of_token = view.token_scores()
        return best(scores, (view.eligible & ~kept)[unit_of_token], left)


class GroupedReserve(Retention, kind="grouped_reserve"):
    """A share of the budget is reserved in equal parts for the best units of each group of proxy queries.

    The queries are cut into `groups` consecutive groups; what their reserves leave is filled by the common score.
    """

    source: ClassVar[str] = "arXiv 2605.08234 App. D (S = sum_m w_m D_m, reserve); the reserve's form is ours"
    needs_queries: ClassVar[bool] = True
    groups: int = Field(default=4, ge=2, le=64)
    share: float = Field(default=0.5, gt=0, le=1)

    def units(self, view: HeadView, budget: int) -> Tensor:
        count = budget // view.block_size
        kept = torch.zeros_like(view.eligible)
        for scores in view.group_scores(self.groups):
            kept |= best(scores, view.eligible & ~kept, int(self.share * count + 1e-9) // self.groups)
        return kept | best(view.scores, view.eligible & ~kept, count - int(kept.sum()))


class GreedySet(Retention, kind="greedy_set"):
    """Evict units one by one so that the joint output change |sum_E g|^2 / a_K^2 stays smallest, then improve by swaps.

    Single scores drop the cross terms <g_c, g_c'>; a set does not. Cost per evicted unit: proxies x units x head_dim,
    so it is for blocks, or for short prompts. Never worse than evicting the units of smallest r |g|^2 one for one: the
    swaps start from that set where it is the better one.
    """

    source: ClassVar[str] = "docs/contracts.md (set objective); the identity is arXiv 2606.01563 eq. 4"
    needs_queries: ClassVar[bool] = True
    proxies: int = Field(default=8, ge=1)
    swaps: int = Field(default=16, ge=0)
    max_units: int = Field(default=2048, ge=2)

    @model_validator(mode="after")
    def _check(self) -> GreedySet:
        if self.proxies * self.max_units > 2**20:
            raise ValueError("'proxies' x 'max_units' above 2^20 would take gigabytes per head")
        return self

    def units(self, view: HeadView, budget: int) -> Tensor:
        count = min(budget // view.block_size, int(view.eligible.sum()))
        if view.scores.numel() > self.max_units:
            from kvpress.errors import ContractError

            raise ContractError(
                f"greedy_set would search {view.scores.numel():,} units, over its max_units of {self.max_units:,}: "
                f"use larger blocks, a shorter prompt, or raise max_units"
            )
        weights, mass, shift = view.vectors(self.proxies)
        n_evicted = int(view.eligible.sum()) - count
        greedy, single = (_EvictedSet(weights, mass, shift, view.eligible) for _ in range(2))
        for _ in range(n_evicted):
            greedy.evict(int(greedy.cost_of_evicting().argmin()))
        single.evict_smallest(n_evicted)
        state = greedy if greedy.cost() <= single.cost() else single
        for _ in range(self.swaps):
            if not state.improve_by_swap():
                break
        return view.eligible & ~state.evicted


class _EvictedSet:
    """The objective sum_u r_u |E_u|^2 / a_{K,u}^2 with E the evicted units' displacement, updated unit by unit."""

    def __init__(self, weights: Tensor, mass: Tensor, shift: Tensor, eligible: Tensor) -> None:
        self.weights, self.mass, self.shift, self.eligible = weights, mass, shift, eligible
        self.own = shift.square().sum(-1)  # [P, U] |g|^2
        self.evicted = torch.zeros_like(eligible)
        self.total = torch.zeros_like(shift[:, 0])  # [P, Dv] sum of evicted g
        self.cross = torch.zeros_like(mass)  # [P, U] <total, g>
        self.lost = torch.zeros_like(mass[:, 0])  # [P] evicted mass

    def cost(self) -> float:
        """The objective of the present set."""
        return float((self.weights * self.total.square().sum(-1) / self._kept(self.lost).square()).sum())

    def cost_of_evicting(self) -> Tensor:
        """[U] objective after evicting each unit too; infinite where that is not allowed."""
        norm = self.total.square().sum(-1, keepdim=True) + 2 * self.cross + self.own
        cost = (self.weights[:, None] * norm / self._kept(self.lost[:, None] + self.mass).square()).sum(0)
        return cost.masked_fill(self.evicted | ~self.eligible, torch.inf)

    def evict(self, unit: int, sign: int = 1) -> None:
        """Evict a unit, or take it back with sign -1."""
        self.evicted[unit] = sign > 0
        self.total = self.total + sign * self.shift[:, unit]
        # a product and a sum: a batched matmul with one column takes three times as long on a CPU
        self.cross = self.cross + sign * (self.shift * self.shift[:, unit, None]).sum(-1)
        self.lost = self.lost + sign * self.mass[:, unit]

    def evict_smallest(self, count: int) -> None:
        """Start with the units whose single displacement sum_u r_u |g|^2 is smallest."""
        single = (self.weights[:, None] * self.own).sum(0).masked_fill(~self.eligible, torch.inf)
        units = single.argsort(stable=True)[:count]
        self.evicted[units] = True
        self.total = self.shift[:, units].sum(1)
        self.cross = torch.einsum("pud,pd->pu", self.shift, self.total)
        self.lost = self.mass[:, units].sum(1)

    def improve_by_swap(self) -> bool:
        """Take back the evicted unit whose exchange for the best kept one lowers the objective most."""
        evicted = self.evicted.nonzero().flatten()
        if evicted.numel() == 0:
            return False
        costs = torch.cat([self._cost_of_exchanging(part) for part in evicted.split(self._units_at_once)])
        best = int(costs.argmin())
        unit, other = int(evicted[best // costs.shape[1]]), best % costs.shape[1]
        if not float(costs.flatten()[best]) < self.cost() * (1 - 1e-9):
            return False
        self.evict(unit, -1)
        self.evict(other)
        return True

    def _cost_of_exchanging(self, units: Tensor) -> Tensor:
        """[E, U] objective after each evicted unit of `units` [E] came back for each kept one; infinite where that is not allowed."""
        between = self.shift[:, units] @ self.shift.transpose(1, 2)  # [P, E, U] <g_e, g_c>
        back = self.total.square().sum(-1, keepdim=True) - 2 * self.cross[:, units] + self.own[:, units]  # |T - g_e|^2
        norm = back[..., None] + 2 * (self.cross[:, None] - between) + self.own[:, None]
        lost = (self.lost[:, None] - self.mass[:, units])[..., None] + self.mass[:, None]
        cost = (self.weights[:, None, None] * norm / self._kept(lost).square()).sum(0)
        return cost.masked_fill(self.evicted | ~self.eligible, torch.inf)

    @property
    def _units_at_once(self) -> int:
        """How many units' exchanges are looked at together: intermediates of a few megabytes, which a core's cache nearly holds."""
        return max(1, (1 << 20) // self.mass.numel())

    @staticmethod
    def _kept(lost: Tensor) -> Tensor:
        return (1 - lost).clamp(min=1e-6)
