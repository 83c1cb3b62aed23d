"""Slot `access`: how the attention of queries and heads becomes one exposure per unit.

Order: reduce over queries, debias, pool over neighbouring units, reduce over the grouped query heads, then over
heads or layers when the scope is wider than a KV head.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from kvpress.slots.base import Choice


class Access(Choice, slot="access"):
    """Base of the aggregations."""


class Aggregate(Access, kind="aggregate"):
    """The one aggregation, with a field for each decision.

    pooling, kernel: smoothing over neighbouring units, stride 1, zero padding counted (SnapKV). Protected units are
        not up for decision: they keep their own exposure and lend none to their neighbours.
    debias: divide by the weight of the queries that could see the unit (T - i for cumulative attention).
    query_reducer: over queries; `mean` divides by the total weight, `max` is KVzip's.
    head_reducer: over the query heads of a KV head, and over KV heads in a wider scope; layers are always summed (eq. 11).
    scope: `head` lets each KV head decide, `layer` gives all heads of a layer one set, `model` gives all layers one set.
    layers, layer_weights: which layers speak in scope `model`, and their beta (all, 1 by default). band: the same as a share of the depth,
        [from, to), for contracts that many models share.
    """

    source: ClassVar[str] = "arXiv 2605.08234 eq. 4-5, 11; pooling: arXiv 2404.14469"
    pooling: Literal["none", "avg", "max"] = "none"
    kernel: int = Field(default=1, ge=1)
    debias: bool = False
    query_reducer: Literal["sum", "mean", "max"] = "mean"
    head_reducer: Literal["sum", "mean", "max"] = "mean"
    scope: Literal["head", "layer", "model"] = "head"
    layers: tuple[int, ...] = ()
    layer_weights: tuple[float, ...] = ()
    band: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _check(self) -> Aggregate:
        if (self.pooling == "none") != (self.kernel == 1):
            raise ValueError("'pooling' needs a 'kernel' above 1, and a kernel needs a pooling other than 'none'")
        if self.kernel % 2 == 0:
            raise ValueError("'kernel' must be odd, so that the window is centred")
        if self.debias and self.query_reducer == "max":
            raise ValueError("'debias' divides a sum by a count, which has no meaning after query_reducer 'max'")
        if self.layers and self.scope != "model":
            raise ValueError("'layers' chooses who speaks in scope 'model'; this scope lets every layer decide itself")
        if self.band is not None:
            if self.scope != "model" or self.layers:
                raise ValueError("'band' chooses who speaks in scope 'model', in place of 'layers'")
            if not 0 <= self.band[0] < self.band[1] <= 1:
                raise ValueError("'band' is a part of the depth, such as [0.5, 0.8]")
        if len(set(self.layers)) != len(self.layers) or min(self.layers, default=0) < 0:
            raise ValueError("'layers' are counted from 0, each named once")
        if self.layer_weights and len(self.layer_weights) != len(self.layers):
            raise ValueError("'layer_weights' needs one weight for each of 'layers'")
        return self

    @property
    def fresh_reducer(self) -> Literal["sum", "max"]:
        """How queries are reduced as they are read; a mean is a sum that is divided at the end."""
        return "max" if self.query_reducer == "max" else "sum"

    def smooth(self, exposure: Tensor, eligible: Tensor) -> Tensor:
        """Pool over neighbouring units that are up for decision; the others stay as they are.

        exposure: [H, G, U] non-negative; eligible: [H, U] bool. Returns [H, G, U].
        """
        if self.pooling == "none":
            return exposure
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        pooled = pool(exposure * eligible[:, None], self.kernel, stride=1, padding=self.kernel // 2)
        return torch.where(eligible[:, None], pooled, exposure)

    def reduce_heads(self, scores: Tensor, dim: int) -> Tensor:
        """Reduce over heads with `head_reducer`."""
        if self.head_reducer == "max":
            return scores.amax(dim)
        return scores.sum(dim) if self.head_reducer == "sum" else scores.mean(dim)

    def combine_layers(self, scores: list[Tensor]) -> Tensor:
        """Scope `model`: one score per unit from every layer's [U] scores (eq. 11: sum over L* with weights beta)."""
        chosen = self.layers or tuple(range(len(scores)))
        if self.band is not None:
            # at least one layer speaks, however shallow the model
            first = min(int(self.band[0] * len(scores)), len(scores) - 1)
            chosen = tuple(range(first, max(round(self.band[1] * len(scores)), first + 1)))
        weights = self.layer_weights or (1.0,) * len(chosen)
        target = scores[0].device
        return torch.stack([w * scores[i].to(target) for i, w in zip(chosen, weights, strict=True)]).sum(0)
