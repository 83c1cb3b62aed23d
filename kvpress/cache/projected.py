"""ProjectedStore: a layer whose tokens are stored in a reduced space, heads of equal ranks together in an ordinary store of that width.

A query is projected once a step, the small output is brought back; keys and values are never. What a segment shows is reduced.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvpress.cache.composite import CompositeStore
from kvpress.cache.packed import PackedStore
from kvpress.cache.paged import PagedStore
from kvpress.matryoshka.layer_projection import LayerProjection, take_heads
from kvpress_kernels.dispatch import op

Inner = PackedStore | PagedStore
#: (keys [B, S, n, rK], values [B, S, n, rV], columns for each row and head) -> the store of one bucket
MakeInner = Callable[[Tensor, Tensor, Sequence[Tensor]], Inner]


class ProjectedStore(CompositeStore):
    """Ragged K/V storage of one layer in its projection's buckets. Segments are numbered row * H + head, as in every store."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        kept: Sequence[Tensor],
        projection: LayerProjection,
        make_inner: MakeInner,
    ) -> None:
        """Project the kept tokens of dense tensors, and store them.

        keys: [B, H, n, D], values: [B, H, n, Dv]; kept: for each (row, head), row-major, the ascending columns [m] to store.
        """
        self.n_heads, self.projection = keys.shape[1], projection
        self._joint: tuple[Any, Tensor, Tensor] | None = None
        self.parts: list[Inner] = []
        for bucket in projection.buckets:
            own = take_heads(keys, bucket.heads), take_heads(values, bucket.heads)
            columns = [kept[row * self.n_heads + head] for row in range(keys.shape[0]) for head in bucket.heads]
            self.parts.append(make_inner(*bucket.reduce(*own), columns))

    @property
    def n_rows(self) -> int:
        return self.parts[0].n_rows

    @property
    def lengths(self) -> list[int]:
        """Tokens stored in each segment."""
        return self._gathered([part.lengths for part in self.parts])

    @property
    def room(self) -> list[int]:
        """Tokens that each segment has room for."""
        return self._gathered([part.room for part in self.parts])

    def row_bytes(self, row: int) -> int:
        """Bytes of the tokens of one row."""
        return sum(part.row_bytes(row) for part in self.parts)

    def decode(self, query: Tensor, **options: Any) -> Tensor:
        """Attention of one token a row: query [B, H, G, D] -> [B, H, G, Dv]."""
        paged = self._in_kernels()
        if paged is not None:
            return self._decode_pages(paged, query, options)
        return self._attention(query, options, lambda part, own, chosen: part.decode(own, **chosen))

    def attend(self, query: Tensor, columns: Tensor, **options: Any) -> Tensor:
        """Attention of q tokens a row in columns [q]: query [B, H, G, q, D] -> [B, H, G, q, Dv]."""
        return self._attention(query, options, lambda part, own, chosen: part.attend(own, columns, **chosen))

    def segment(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """One segment's reduced keys [n, rK], values [n, rV], and positions [n]."""
        row, head = divmod(index, self.n_heads)
        bucket, place = self.projection.bucket_of(head)
        part = self.parts[self.projection.buckets.index(bucket)]
        return part.segment(row * len(bucket.heads) + place)

    def bases(self, index: int) -> tuple[Tensor, Tensor]:
        """Bases [1, D, rK] of a segment's keys and [1, Dv, rV] of its values."""
        bucket, place = self.projection.bucket_of(index % self.n_heads)
        return bucket.keys[place : place + 1], bucket.values[place : place + 1]

    def append(self, keys: Tensor, values: Tensor, columns: Tensor, valid: Tensor | None = None) -> None:
        """Add new tokens at the end of every segment: keys [B, H, q, D], values, columns [q]; valid: [B, q] on the host."""
        paged = self._in_kernels()
        if paged is not None:
            self._append_to_pages(paged, keys, values, columns, valid)
            return
        for bucket, part in zip(self.projection.buckets, self.parts, strict=True):
            own = take_heads(keys, bucket.heads), take_heads(values, bucket.heads)
            part.append(*bucket.reduce(*own), columns, valid)

    def keep(self, kept: Sequence[Tensor]) -> None:
        """Reduce every segment to the tokens that `kept` (ascending indices) names, and free the rest."""
        for bucket, part in zip(self.projection.buckets, self.parts, strict=True):
            part.keep([kept[row * self.n_heads + head] for row in range(part.n_rows) for head in bucket.heads])

    def stored_before(self, column: int) -> list[int]:
        """Tokens of each segment that stand before a column of the input."""
        return self._gathered([part.stored_before(column) for part in self.parts])

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep, reorder or repeat rows (beam search)."""
        for part in self.parts:
            part.select_rows(rows)

    @staticmethod
    def joined(stores: Sequence[ProjectedStore]) -> ProjectedStore:
        """A store whose rows are those of several stores of one projection, one after the other."""
        new = copy.copy(stores[0])
        new._joint = None
        new.parts = [type(parts[0]).joined(parts) for parts in zip(*(store.parts for store in stores), strict=True)]
        return new

    def _in_kernels(self) -> list[PagedStore] | None:
        """All parts, where one launch can serve heads of all ranks; else None."""
        paged = [part for part in self.parts if isinstance(part, PagedStore) and part.backend == "triton"]
        return paged if len(paged) == len(self.parts) else None

    def _append_to_pages(
        self, parts: Sequence[PagedStore], keys: Tensor, values: Tensor, columns: Tensor, valid: Tensor | None
    ) -> None:
        """Project and store in one launch, and count in every part."""
        counts = [keys.shape[2]] * self.n_rows if valid is None else [int(row.sum()) for row in valid]
        new = [[count for count in counts for _ in range(part.n_heads)] for part in parts]
        for part, more in zip(parts, new, strict=True):
            part.reserve(more)
        table, lengths = self._joint_table(parts)
        padded = self.projection.padded
        pages = [part.table.pool.pages for part in parts]
        op("project_append", "triton")(
            keys, values, columns, pages, table, lengths, padded.ranks, padded.keys, padded.values,
            valid=None if valid is None else valid.to(keys.device),
        )  # fmt: skip
        for part, more in zip(parts, new, strict=True):
            part.advance(more)
            if len(parts) > 1:  # the kernel has counted in a copy
                part.reset_device_lengths()

    def _decode_pages(self, parts: Sequence[PagedStore], query: Tensor, options: dict[str, Any]) -> Tensor:
        """One launch for all heads: the kernel takes each row's ranks as data."""
        table, lengths = self._joint_table(parts)
        padded = self.projection.padded
        pages = [part.table.pool.pages for part in parts]
        output: Tensor = op("lowrank_decode", "triton")(
            query, pages, table, lengths, padded.ranks, padded.keys, padded.values, lost=padded.lost, **options
        )
        return output

    def _joint_table(self, parts: Sequence[PagedStore]) -> tuple[Tensor, Tensor]:
        """Page table [B * H, M] and lengths [B * H] of all rows in their order. The table is renewed when one of the parts' tables has
        changed; lengths are those that the device counts."""
        if len(parts) == 1:
            return parts[0].table.device, parts[0].device_lengths
        versions = tuple((part.table.version, part.table.device.data_ptr(), part.n_rows) for part in parts)
        if self._joint is None or self._joint[0] != versions:
            width = max(part.table.device.shape[1] for part in parts)
            tables = torch.cat([F.pad(part.table.device, (0, width - part.table.device.shape[1])) for part in parts])
            ends = list(itertools.accumulate((len(part.lengths) for part in parts), initial=0))
            places = self._gathered([range(start, end) for start, end in itertools.pairwise(ends)])
            order = torch.tensor(places, device=tables.device)
            self._joint = versions, tables[order].contiguous(), order
        _, table, order = self._joint
        return table, torch.cat([part.device_lengths for part in parts])[order]

    def _attention(self, query: Tensor, options: dict[str, Any], run: Callable[[Inner, Tensor, Any], Tensor]) -> Tensor:
        parts = []
        for bucket, part in zip(self.projection.buckets, self.parts, strict=True):
            chosen = dict(options)
            if options.get("sinks") is not None:
                chosen["sinks"] = options["sinks"].view(self.n_heads, -1)[list(bucket.heads)].flatten()
            own = bucket.reduce_query(take_heads(query, bucket.heads))
            parts.append(bucket.bring_back(run(part, own, chosen)))
        if len(parts) == 1:
            return parts[0]
        order = [head for bucket in self.projection.buckets for head in bucket.heads]
        back = [order.index(head) for head in range(self.n_heads)]
        return torch.cat(parts, 1)[:, back]

    def _gathered(self, parts: Sequence[Sequence[int]]) -> list[int]:
        """Numbers per segment of each bucket, in the order of all segments."""
        found = [0] * (self.n_rows * self.n_heads)
        for bucket, numbers in zip(self.projection.buckets, parts, strict=True):
            for index, number in enumerate(numbers):
                row, place = divmod(index, len(bucket.heads))
                found[row * self.n_heads + bucket.heads[place]] = number
        return found
