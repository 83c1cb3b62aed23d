"""One layer's bases cut to their ranks, as the cache uses them: heads of equal ranks together, in one matmul."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kvpress.matryoshka.bases import Bases, Ranks
from kvpress.matryoshka.student import lost_mean


@dataclass(frozen=True, eq=False)
class Bucket:
    """KV heads [S] of a layer with the same ranks. keys: [S, D, rK]; values: [S, Dv, rV]; lost: [S, Dv] what the projection takes from the
    value mean, or None. All float32: half-precision bases are orthogonal to three digits only."""

    heads: tuple[int, ...]
    keys: Tensor
    values: Tensor
    lost: Tensor | None

    def reduce(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, S, n, D] and values of the bucket's heads in the reduced space, in their own dtype."""
        return _times(keys, self.keys), _times(values, self.values)

    def reduce_query(self, query: Tensor) -> Tensor:
        """Queries [B, S, ..., D] in the reduced space of the keys."""
        extra = (1,) * (query.dim() - 4)
        return _times(query, self.keys.reshape(self.keys.shape[0], *extra, *self.keys.shape[1:]))

    def bring_back(self, output: Tensor) -> Tensor:
        """Attention output [B, S, G, ..., rV] in the full space; the weights over the stored tokens must add up to one."""
        extra = (1,) * (output.dim() - 4)
        basis = self.values.transpose(1, 2)
        full = _times(output, basis.reshape(basis.shape[0], *extra, *basis.shape[1:]))
        if self.lost is None:
            return full
        return full + self.lost.reshape(self.lost.shape[0], *(1,) * (output.dim() - 3), -1).to(full.dtype)

    def to(self, device: torch.device) -> Bucket:
        """The bucket on a device."""
        lost = None if self.lost is None else self.lost.to(device)
        return Bucket(self.heads, self.keys.to(device), self.values.to(device), lost)


class Padded(NamedTuple):
    """The bases of all heads of a layer in one tensor each, for a kernel that takes ranks as data.

    ranks: [H, 2] int32; keys: [H, D, RK] and values: [H, Dv, RV] float32, zero in the columns from a head's rank on; lost: [H, Dv] or None.
    """

    ranks: Tensor
    keys: Tensor
    values: Tensor
    lost: Tensor | None


@dataclass(frozen=True, eq=False)
class LayerProjection:
    """The buckets of one layer with H KV heads; dims: (D, Dv)."""

    buckets: tuple[Bucket, ...]
    n_heads: int
    dims: tuple[int, int]
    _moved: dict[torch.device, LayerProjection] = field(default_factory=dict, repr=False)

    @property
    def has_means(self) -> bool:
        return any(bucket.lost is not None for bucket in self.buckets)

    @property
    def ranks(self) -> list[tuple[int, int]]:
        """(rK, rV) of each KV head."""
        found = {head: (b.keys.shape[-1], b.values.shape[-1]) for b in self.buckets for head in b.heads}
        return [found[head] for head in range(self.n_heads)]

    @cached_property
    def padded(self) -> Padded:
        """The bases as one launch over all heads reads them."""
        device, ranks = self.buckets[0].keys.device, self.ranks
        keys = torch.zeros(self.n_heads, self.dims[0], max(key for key, _ in ranks), device=device)
        values = torch.zeros(self.n_heads, self.dims[1], max(value for _, value in ranks), device=device)
        lost = torch.zeros(self.n_heads, self.dims[1], device=device)
        for bucket in self.buckets:
            heads = list(bucket.heads)
            keys[heads, :, : bucket.keys.shape[-1]] = bucket.keys
            values[heads, :, : bucket.values.shape[-1]] = bucket.values
            if bucket.lost is not None:
                lost[heads] = bucket.lost
        at = torch.tensor(ranks, dtype=torch.int32, device=device)
        return Padded(at, keys, values, lost if self.has_means else None)

    @classmethod
    def of(cls, bases: Bases, ranks: Ranks, place: int) -> LayerProjection:
        """The projection of the layer at `place`."""
        keys, values = bases.keys[place], bases.values[place]
        by_ranks: dict[tuple[int, int], list[int]] = {}
        for head, pair in enumerate(zip(ranks.keys[place], ranks.values[place], strict=True)):
            by_ranks.setdefault(pair, []).append(head)
        buckets = []
        for (key_rank, value_rank), heads in sorted(by_ranks.items()):
            value_basis = values[heads][:, :, :value_rank].contiguous()
            lost = None
            if bases.means is not None and value_rank < values.shape[-1]:
                lost = lost_mean(value_basis, bases.means[place][heads])
            buckets.append(Bucket(tuple(heads), keys[heads][:, :, :key_rank].contiguous(), value_basis, lost))
        return cls(tuple(buckets), keys.shape[0], (keys.shape[-1], values.shape[-1]))

    def to(self, device: torch.device) -> LayerProjection:
        """The projection on a device: layers of one model may live on several."""
        if self.buckets[0].keys.device == device:
            return self
        if device not in self._moved:  # every cache of a model asks for the same
            self._moved[device] = LayerProjection(tuple(b.to(device) for b in self.buckets), self.n_heads, self.dims)
        return self._moved[device]

    def bucket_of(self, head: int) -> tuple[Bucket, int]:
        """The bucket that holds a KV head, and the head's place in it."""
        for bucket in self.buckets:
            if head in bucket.heads:
                return bucket, bucket.heads.index(head)
        raise IndexError(head)


def take_heads(tensor: Tensor, heads: Sequence[int]) -> Tensor:
    """The heads of [B, H, ...]; a view where they are all of them in order."""
    return tensor if list(heads) == list(range(tensor.shape[1])) else tensor[:, list(heads)]


def _times(vectors: Tensor, basis: Tensor) -> Tensor:
    """Vectors [B, S, ..., n, d] times a basis [S, ..., d, r]: computed in float32 or wider, in the vectors' own dtype."""
    wide = torch.promote_types(vectors.dtype, torch.float32)
    return (vectors.to(wide) @ basis.to(wide)).to(vectors.dtype)
