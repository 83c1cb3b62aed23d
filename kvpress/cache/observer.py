"""Observer: is told what the layers of a cache see and decide, and changes nothing. Diagnostics are made of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from kvpress.cache.layer import CompressedLayer
    from kvpress.selection import Decision, Scored


class Observer(Protocol):
    """Set as `cache.plan.observer`. The tensors belong to the cache: copy what is to be kept."""

    def saw(self, layer: CompressedLayer, query: Tensor, first: int) -> None:
        """A layer has attended with queries [B, Hq, q, D] at columns first, first + 1, ..."""

    def decided(self, layer: CompressedLayer, row: int, scored: Scored, decision: Decision) -> None:
        """A layer was cut in one row. `decision.kept` are indices among the tokens of `scored.problem.features`."""
