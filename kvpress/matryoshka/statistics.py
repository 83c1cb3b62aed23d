"""Second moments of what attention reads and writes, over any text, in float64 and without holding more than one window.

keys      after rotation, as they are cached
values    as they are cached
queries   after rotation, those of all query heads that share a KV head
outputs   of the attention, likewise
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpress.evidence import LayerSpec
from kvpress.matryoshka.passing import attached, read_window


@dataclass
class Moments:
    """First and second moments of vectors [.., d] of H heads, added up in float64."""

    n: int = 0
    first: Tensor = field(default_factory=lambda: torch.zeros(()))
    second: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, vectors: Tensor) -> None:
        """Add vectors [H, n, d]."""
        wide = vectors.double()
        self.first = self.first.to(wide.device) + wide.sum(1)
        self.second = self.second.to(wide.device) + wide.transpose(1, 2) @ wide
        self.n += wide.shape[1]

    @property
    def mean(self) -> Tensor:
        """[H, d]."""
        return self.first / self.n

    @property
    def uncentred(self) -> Tensor:
        """[H, d, d] mean of x x^T."""
        return self.second / self.n

    @property
    def covariance(self) -> Tensor:
        """[H, d, d] mean of (x - mean)(x - mean)^T."""
        mean = self.mean
        return self.uncentred - mean[:, :, None] * mean[:, None, :]


@dataclass
class LayerMoments:
    """Moments of one layer, per KV head: queries and outputs are those of all query heads of the group."""

    keys: Moments = field(default_factory=Moments)
    values: Moments = field(default_factory=Moments)
    queries: Moments = field(default_factory=Moments)
    outputs: Moments = field(default_factory=Moments)


def collect(model: PreTrainedModel, windows: Iterable[Tensor]) -> list[LayerMoments]:
    """Moments of every compressed layer over windows of ids [B, n]; n should be the length that will be served.

    Rotation spreads slow planes of the keys over their directions only at length: bases of short windows miss what long ones need.
    """
    found: dict[int, LayerMoments] = {}

    def watch(place: int, query: Tensor, keys: Tensor, values: Tensor, own: Any, spec: LayerSpec) -> Tensor:
        moments = found.setdefault(place, LayerMoments())
        output: Tensor = own(query, keys, values)  # [B, q, Hq, Dv]
        moments.keys.add(_heads(keys))
        moments.values.add(_heads(values))
        moments.queries.add(_grouped(query, spec.group))
        moments.outputs.add(_grouped(output.transpose(1, 2), spec.group))
        return output

    with torch.no_grad(), attached(model):
        for ids in windows:
            read_window(model, ids.to(model.device), watch, logits_to_keep=1)
    return [found[place] for place in range(len(found))]


def _heads(tensor: Tensor) -> Tensor:
    """[B, H, n, d] -> [H, B n, d]."""
    return tensor.transpose(0, 1).flatten(1, 2)


def _grouped(tensor: Tensor, group: int) -> Tensor:
    """[B, H G, n, d] -> [H, B G n, d]."""
    found: Tensor = tensor.unflatten(1, (-1, group))
    return found.transpose(0, 1).flatten(1, 3)
