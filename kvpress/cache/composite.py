"""CompositeStore: what adds up over the stores that a layer's store is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


class CompositeStore:
    """Base of stores that are made of stores, by rows (`JoinedRows`) or by KV heads (`ProjectedStore`); `parts` are those."""

    n_heads: int
    parts: Sequence[Any]

    @property
    def n_rows(self) -> int:
        raise NotImplementedError

    def segment(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """One segment's keys, values and positions as its part shows them."""
        raise NotImplementedError

    def segments(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All segments, row-major."""
        return (self.segment(index) for index in range(self.n_rows * self.n_heads))

    @property
    def nbytes(self) -> int:
        """Bytes of all parts. Bases belong to the model, like its weights."""
        return sum(part.nbytes for part in self.parts)

    @property
    def index_bytes(self) -> int:
        """Of `nbytes`, what says where tokens are."""
        return sum(part.index_bytes for part in self.parts)

    @property
    def slack_bytes(self) -> int:
        """Of `nbytes`, room that holds no token yet."""
        return sum(part.slack_bytes for part in self.parts)

    def truncate(self, column: int) -> None:
        """Forget tokens at or behind a column of the input."""
        for part in self.parts:
            part.truncate(column)
