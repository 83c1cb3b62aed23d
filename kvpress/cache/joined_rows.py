"""JoinedRows: one batch whose rows are stored in different formats; each run of rows of one format is an ordinary store."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvpress.cache.composite import CompositeStore
from kvpress.cache.packed import PackedStore
from kvpress.cache.paged import PagedStore
from kvpress.cache.projected import ProjectedStore
from kvpress.errors import KvpressError

Part = PackedStore | PagedStore | ProjectedStore


class JoinedRows(CompositeStore):
    """Stores of one layer, their rows one after the other. Rows can be dropped, not repeated or reordered."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self.n_heads = parts[0].n_heads

    @staticmethod
    def of(stores: Sequence[Part]) -> Part | JoinedRows:
        """The rows of several stores; neighbours of one format become one store, and all of them if there is but one format."""
        runs = [list(run) for _, run in itertools.groupby(stores, key=_form)]
        parts = [type(run[0]).joined(run) for run in runs]  # type: ignore[arg-type]
        return parts[0] if len(parts) == 1 else JoinedRows(parts)

    @property
    def n_rows(self) -> int:
        return sum(part.n_rows for part in self.parts)

    @property
    def lengths(self) -> list[int]:
        """Tokens stored in each segment."""
        return [n for part in self.parts for n in part.lengths]

    @property
    def room(self) -> list[int]:
        """Tokens that each segment has room for."""
        return [n for part in self.parts for n in part.room]

    def row_bytes(self, row: int) -> int:
        """Bytes of the tokens of one row."""
        part, first = self._part(row)
        return part.row_bytes(row - first)

    def decode(self, query: Tensor, **options: Any) -> Tensor:
        """Attention of one token a row: query [B, H, G, D] -> [B, H, G, Dv]."""
        return torch.cat([part.decode(query[rows], **options) for part, rows in self._slices()])

    def attend(self, query: Tensor, columns: Tensor, **options: Any) -> Tensor:
        """Attention of q tokens a row in columns [q]: query [B, H, G, q, D] -> [B, H, G, q, Dv]."""
        return torch.cat([part.attend(query[rows], columns, **options) for part, rows in self._slices()])

    def segment(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """One segment's keys, values and positions as its part shows them."""
        part, first = self._part(index // self.n_heads)
        return part.segment(index - first * self.n_heads)

    def bases(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Bases of a segment that is stored in a reduced space."""
        part, first = self._part(index // self.n_heads)
        return part.bases(index - first * self.n_heads)

    def append(self, keys: Tensor, values: Tensor, columns: Tensor, valid: Tensor | None = None) -> None:
        """Add new tokens at the end of every segment: keys [B, H, q, D], values, columns [q]; valid: [B, q] on the host."""
        for part, rows in self._slices():
            part.append(keys[rows], values[rows], columns, None if valid is None else valid[rows])

    def keep(self, kept: Sequence[Tensor]) -> None:
        """Reduce every segment to the tokens that `kept` (ascending indices) names."""
        for part, rows in self._slices():
            part.keep(kept[rows.start * self.n_heads : rows.stop * self.n_heads])

    def stored_before(self, column: int) -> list[int]:
        """Tokens of each segment that stand before a column of the input."""
        return [n for part in self.parts for n in part.stored_before(column)]

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep some rows, in their order.

        Raises:
            KvpressError: a row is repeated or moved, which would need it in another format.
        """
        if any(b <= a for a, b in itertools.pairwise(rows)):
            raise KvpressError(
                "rows that are stored in different formats can be dropped, but not repeated or reordered"
            )
        left = []
        for part, span in self._slices():
            own = [row - span.start for row in rows if span.start <= row < span.stop]
            if own:
                part.select_rows(own)
                left.append(part)
        self.parts = left

    def _slices(self) -> Iterator[tuple[Part, slice]]:
        """The parts with their rows."""
        first = 0
        for part in self.parts:
            yield part, slice(first, first + part.n_rows)
            first += part.n_rows

    def _part(self, row: int) -> tuple[Part, int]:
        """The part that holds a row, and its first row."""
        return next((part, rows.start) for part, rows in self._slices() if row < rows.stop)


def _form(store: Part) -> tuple[Any, ...]:
    """What stores that can become one have in common."""
    if isinstance(store, ProjectedStore):
        return (id(store.projection), *(_form(part) for part in store.parts))
    if isinstance(store, PagedStore):
        return (PagedStore, id(store.table.pool))
    return (PackedStore, store.keys.dtype, store.keys.shape[1], store.values.shape[1])
