"""Evidence that outlives its queries: the sums that a cumulative law keeps of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvpress.evidence import UnitFeatures


@dataclass
class CarriedStatistics:
    """Statistics of queries that are gone, kept by the first position of their unit: they survive eviction and growth.

    Per KV head: starts [U] ascending and statistics [G, U].
    """

    starts: list[Tensor] = field(default_factory=list)
    values: list[dict[str, Tensor]] = field(default_factory=list)
    weight: float = 0.0

    @property
    def nbytes(self) -> int:
        tensors = [*self.starts, *(t for head in self.values for t in head.values())]
        return sum(t.numel() * t.element_size() for t in tensors)

    @classmethod
    def empty(cls, n_heads: int, device: torch.device) -> CarriedStatistics:
        """Nothing seen yet."""
        return cls([torch.empty(0, dtype=torch.long, device=device)] * n_heads, [{} for _ in range(n_heads)])

    def keep(self, positions: Sequence[Tensor], block_size: int) -> None:
        """Forget the units of which nothing is stored any more; positions: [n] per KV head."""
        for head, stored in enumerate(positions):
            alive = torch.isin(self.starts[head], stored // block_size * block_size)
            self.starts[head] = self.starts[head][alive]
            self.values[head] = {name: value[:, alive] for name, value in self.values[head].items()}

    def merge_into(self, statistics: dict[str, Tensor], features: UnitFeatures, reducer: str) -> dict[str, Tensor]:
        """Add the carried statistics to fresh ones [H, G, U] of the units at hand."""
        for head, (starts, values) in enumerate(zip(self.starts, self.values, strict=True)):
            current = features.starts[head][features.valid[head]]
            at = torch.searchsorted(starts, current).clamp(max=max(starts.numel() - 1, 0))
            known = (starts[at] == current) if starts.numel() else torch.zeros_like(current, dtype=torch.bool)
            for name, target in statistics.items():
                row = target[head, :, : current.numel()]
                old = values[name][:, at] * known if starts.numel() else torch.zeros_like(row)
                row.copy_(torch.maximum(row, old) if reducer == "max" else row + old)
        return statistics

    @classmethod
    def of(cls, statistics: dict[str, Tensor], features: UnitFeatures, weight: float) -> CarriedStatistics:
        """Carry [H, G, U] statistics of the units at hand."""
        valid = features.valid
        return cls(
            [features.starts[h][valid[h]].clone() for h in range(features.n_heads)],
            [{k: v[h, :, valid[h]].clone() for k, v in statistics.items()} for h in range(features.n_heads)],
            weight,
        )
