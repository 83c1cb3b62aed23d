"""Second moments of what attention reads and writes, over any text, in float64 and without holding more than one window.

keys      after rotation, as they are cached
values    as they are cached
queries   after rotation, those of all query heads that share a KV head
outputs   of the attention, likewise
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from kvpress.evidence import LayerSpec
from kvpress.files import write_atomically
from kvpress.matryoshka.passing import attached, read_window

NAMES = ("keys", "values", "queries", "outputs")


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


def collect(
    model: PreTrainedModel, windows: Iterable[Tensor], watch: Callable[[int], None] = lambda done: None
) -> list[LayerMoments]:
    """Moments of every compressed layer over windows of ids [B, n]; n should be the length that will be served.

    Rotation spreads slow planes of the keys over their directions only at length: bases of short windows miss what long ones need.
    """
    found: dict[int, LayerMoments] = {}

    def look(place: int, query: Tensor, keys: Tensor, values: Tensor, own: Any, spec: LayerSpec) -> Tensor:
        moments = found.setdefault(place, LayerMoments())
        output: Tensor = own(query, keys, values)  # [B, q, Hq, Dv]
        moments.keys.add(_heads(keys))
        moments.values.add(_heads(values))
        moments.queries.add(_grouped(query, spec.group))
        moments.outputs.add(_grouped(output.transpose(1, 2), spec.group))
        return output

    with torch.no_grad(), attached(model):
        for done, ids in enumerate(windows, start=1):
            read_window(model, ids.to(model.device), look, logits_to_keep=1)
            watch(done)
    return [found[place] for place in range(len(found))]


def save_moments(path: Path, moments: Sequence[LayerMoments], made: str) -> None:
    """Write moments, at once or not at all. made: digest of what they were made from."""
    tensors, counts = {}, {}
    for place, layer in enumerate(moments):
        for name in NAMES:
            one: Moments = getattr(layer, name)
            tensors[f"{place}.{name}.first"], tensors[f"{place}.{name}.second"] = one.first.cpu(), one.second.cpu()
            counts[f"{place}.{name}"] = one.n
    write_atomically(path, save(tensors, {"made": made, "counts": json.dumps(counts)}))


def load_moments(path: Path, made: str) -> list[LayerMoments] | None:
    """Moments of a file that were made from the same; None where there are none, or the file is damaged."""
    try:
        with safe_open(str(path), framework="pt") as file:
            head = file.metadata() or {}
            if head.get("made") != made:
                return None
            counts = json.loads(head["counts"])
            found: list[LayerMoments] = []
            for key, n in counts.items():
                place, name = key.split(".")
                while len(found) <= int(place):
                    found.append(LayerMoments())
                setattr(
                    found[int(place)],
                    name,
                    Moments(n, file.get_tensor(f"{key}.first"), file.get_tensor(f"{key}.second")),
                )
            return found
    except (OSError, SafetensorError, ValueError, KeyError):
        return None


def _heads(tensor: Tensor) -> Tensor:
    """[B, H, n, d] -> [H, B n, d]."""
    return tensor.transpose(0, 1).flatten(1, 2)


def _grouped(tensor: Tensor, group: int) -> Tensor:
    """[B, H G, n, d] -> [H, B G n, d]."""
    found: Tensor = tensor.unflatten(1, (-1, group))
    return found.transpose(0, 1).flatten(1, 3)
