"""Slot `allocation`: how the budget is spread over layers and heads.

Budgets here are tokens per KV head *beyond* the protected ones. Sums are exact: rounding never spends more or less
than the contract's budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from pydantic import Field, model_validator
from torch import Tensor

from kvpress.errors import ContractError
from kvpress.slots.base import Choice


@dataclass(frozen=True)
class Candidates:
    """One layer's decision for one sequence: scores [H, U], sizes [H, U] in tokens, eligible [H, U] (not protected).

    n_free: tokens seen so far that are not protected, whether or not this layer still has them.
    """

    scores: Tensor
    sizes: Tensor
    eligible: Tensor
    n_free: int


class Allocation(Choice, slot="allocation"):
    """Base of the allocations."""

    #: True when no layer can be decided before all layers have been scored
    needs_all_layers: ClassVar[bool] = False

    def layer(self, base: int, candidates: Candidates, layer: int, n_layers: int) -> list[int]:
        """Tokens [H] of one layer.

        Args:
            base: mean tokens per KV head.
            layer: index among the compressed layers, n_layers: how many there are.
        """
        raise NotImplementedError

    def model(self, base: int, candidates: list[Candidates]) -> list[list[int]]:
        """Tokens [L][H] of all layers."""
        return [self.layer(base, c, index, len(candidates)) for index, c in enumerate(candidates)]


class Uniform(Allocation, kind="uniform"):
    """Every head of every layer gets the same."""

    source: ClassVar[str] = "arXiv 2404.14469 (SnapKV)"

    def layer(self, base: int, candidates: Candidates, layer: int, n_layers: int) -> list[int]:
        return [base] * candidates.scores.shape[0]


class Pyramid(Allocation, kind="pyramid"):
    """Linear over depth: the last layer gets base / beta, the first 2 base - base / beta, capped at the prompt."""

    source: ClassVar[str] = "arXiv 2406.02069 (PyramidKV) eq. 2-3, beta 20"
    beta: float = Field(default=20.0, ge=1)

    def layer(self, base: int, candidates: Candidates, layer: int, n_layers: int) -> list[int]:
        if n_layers == 1:
            return [base] * candidates.scores.shape[0]
        last = base / self.beta
        first = 2 * base - last
        if first > candidates.n_free:  # the first layers cannot hold more than the prompt: the rest moves down
            first, last = candidates.n_free, 2 * base - candidates.n_free
        exact = [first - (first - last) * index / (n_layers - 1) for index in range(n_layers)]
        return [round_to_sum(exact, base * n_layers)[layer]] * candidates.scores.shape[0]


class Ada(Allocation, kind="ada"):
    """Heads of a layer share its budget: (1 - floor) by counting a top-k over all its heads, `floor` evenly."""

    source: ClassVar[str] = "arXiv 2407.11550 (Ada-KV) Algorithm 1, safeguard 0.2"
    floor: float = Field(default=0.2, ge=0, le=1)

    def layer(self, base: int, candidates: Candidates, layer: int, n_layers: int) -> list[int]:
        return _by_competition(base, [candidates], self.floor)[0]


class GlobalAllocation(Allocation, kind="global"):
    """All heads of all layers share one budget: one top-k over all their units. Holds every layer's full cache."""

    source: ClassVar[str] = "arXiv 2505.23416 (KVzip, non-uniform), arXiv 2605.07234 (LaProx)"
    needs_all_layers: ClassVar[bool] = True
    floor: float = Field(default=0.0, ge=0, le=1)

    def model(self, base: int, candidates: list[Candidates]) -> list[list[int]]:
        return _by_competition(base, candidates, self.floor)


class FromFile(Allocation, kind="file"):
    """Calibrated weights [L][H] from a YAML or JSON file (`path`), scaled to the budget.

    The weights themselves become part of the contract, so that its id does not depend on where the file lies.
    """

    source: ClassVar[str] = "calibrated by the user"
    weights: tuple[tuple[float, ...], ...]

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if isinstance(data, dict) and "path" in data:
            if set(data) != {"path"} or not isinstance(data["path"], str | Path):
                raise ContractError("allocation 'file' takes the 'path' of a file or its 'weights', and nothing else")
            path = Path(data["path"])
            try:
                if path.stat().st_size > 16 * 2**20:
                    raise ContractError(
                        f"allocation file '{path}' is over 16 MiB: it should hold one weight per layer and head"
                    )
                weights = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
                raise ContractError(f"allocation file '{path}' cannot be read: {str(error).splitlines()[0]}") from None
            return {"weights": weights["weights"] if isinstance(weights, dict) and "weights" in weights else weights}
        return data

    @model_validator(mode="after")
    def _check(self) -> FromFile:
        flat = [w for row in self.weights for w in row]
        if not flat or min(flat) < 0 or sum(flat) <= 0 or len({len(row) for row in self.weights}) != 1:
            raise ValueError("weights must be a non-negative table [layers][KV heads] with a positive sum")
        return self

    def layer(self, base: int, candidates: Candidates, layer: int, n_layers: int) -> list[int]:
        n_heads = candidates.scores.shape[0]
        if (len(self.weights), len(self.weights[0])) != (n_layers, n_heads):
            raise ContractError(
                f"the allocation file has weights for {len(self.weights)} layers x {len(self.weights[0])} KV heads, "
                f"but the model compresses {n_layers} layers x {n_heads} KV heads"
            )
        total = base * n_layers * n_heads
        flat = [w for row in self.weights for w in row]
        exact = [w * total / sum(flat) for w in flat]
        return round_to_sum(exact, total)[layer * n_heads : (layer + 1) * n_heads]


def _by_competition(base: int, layers: list[Candidates], floor: float) -> list[list[int]]:
    """Count each head's tokens in one top-k over all eligible units of `layers`, then mix with `floor` * base."""
    n_heads = [c.scores.shape[0] for c in layers]
    device = layers[0].scores.device
    scores = torch.cat(
        [c.scores.to(device, torch.float64).masked_fill(~c.eligible.to(device), -torch.inf).flatten() for c in layers]
    )
    sizes = torch.cat([(c.sizes * c.eligible).to(device).flatten() for c in layers])
    owner = torch.cat([
        first + torch.arange(c.scores.shape[0], device=device).repeat_interleave(c.scores.shape[1])
        for c, first in zip(layers, _offsets(n_heads), strict=True)
    ])  # fmt: skip
    total = base * sum(n_heads)
    order = scores.argsort(descending=True, stable=True)
    order = order[sizes[order].cumsum(0) <= total]
    won = torch.zeros(sum(n_heads), dtype=torch.float64, device=device)
    won.index_add_(0, owner[order], sizes[order].double())
    exact = [floor * base + (1 - floor) * count for count in won.tolist()]
    budgets = round_to_sum(exact, min(total, round(sum(exact))))
    return [budgets[first : first + n] for first, n in zip(_offsets(n_heads), n_heads, strict=True)]


def _offsets(counts: list[int]) -> list[int]:
    return [sum(counts[:index]) for index in range(len(counts))]


def round_to_sum(exact: list[float], total: int) -> list[int]:
    """Integers close to `exact` with the given sum (largest remainders first, earlier entries on ties)."""
    whole = [int(x + 1e-9) for x in exact]
    rest = total - sum(whole)
    by_remainder = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for index in by_remainder[: max(rest, 0)]:
        whole[index] += 1
    return whole
