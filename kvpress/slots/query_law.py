"""Slot `query_law`: whose queries are the evidence, and with which weights.

Positions are counted from the sequence's first real token, so a law gives the same weights to a row alone and to
the same row in a padded batch.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvpress.slots.base import Choice

#: where the queries come from: the prompt (and later the answer), the first decode steps, or an extra forward pass
Origin = Literal["stream", "first_decode_steps", "reconstruction", "oracle"]


class QueryLaw(Choice, slot="query_law"):
    """Base: a weight for each query position; weight 0 means that the query is not evidence."""

    origin: ClassVar[Origin] = "stream"

    def weights(self, positions: Tensor, n_seen: int) -> Tensor:
        """Weights r_u, not yet normalised.

        Args:
            positions: [Q] int64 positions of the queries at hand.
            n_seen: real tokens of the sequence so far; the last query has position n_seen - 1.

        Returns:
            [Q] float64, non-negative.
        """
        raise NotImplementedError

    @property
    def cumulative(self) -> bool:
        """True when every query counts, so that evidence is added up chunk by chunk instead of being kept as queries."""
        return False


class EveryQuery(QueryLaw):
    """Base of the laws under which every query of the origin counts the same."""

    def weights(self, positions: Tensor, n_seen: int) -> Tensor:
        return (positions >= 0).double()

    @property
    def cumulative(self) -> bool:
        return True


class All(EveryQuery, kind="all"):
    """Every query of the prompt and of the answer so far: cumulative attention."""

    source: ClassVar[str] = "arXiv 2306.14048 (H2O)"


class Tail(QueryLaw, kind="tail"):
    """The last `window` queries, equally weighted."""

    source: ClassVar[str] = "arXiv 2404.14469 (SnapKV); window 1 is arXiv 2401.06104 (TOVA)"
    window: int = Field(default=32, ge=1)

    def weights(self, positions: Tensor, n_seen: int) -> Tensor:
        return (positions >= max(n_seen - self.window, 0)).double()


class TailAnchors(QueryLaw, kind="tail_anchors"):
    """Tail queries with recency weights exp(-(T-u)/tau), plus anchors of weight 1.

    The paper's detector of instruction, question and field boundaries is not disclosed. Our anchors are `anchors`
    positions spread evenly over the prompt, which needs no knowledge of its format; `spans` names them exactly.
    """

    source: ClassVar[str] = "arXiv 2605.08234 eq. 10"
    window: int = Field(default=32, ge=1)
    tau: float = Field(default=16.0, gt=0)
    anchors: int = Field(default=8, ge=0)
    spans: tuple[tuple[int, int], ...] = ()

    @model_validator(mode="after")
    def _check(self) -> TailAnchors:
        for start, end in self.spans:
            if not 0 <= start < end:
                raise ValueError(f"span [{start}, {end}) is empty or negative")
        return self

    def weights(self, positions: Tensor, n_seen: int) -> Tensor:
        tail = positions >= max(n_seen - self.window, 0)
        last = n_seen - 1
        weights = torch.where(tail, torch.exp(-(last - positions).double() / self.tau), 0.0)
        anchor = torch.zeros_like(tail)
        for start, end in self.spans:
            anchor |= (positions >= start) & (positions < end)
        if not self.spans and self.anchors:
            chosen = torch.linspace(0, last, self.anchors + 2, device=positions.device)[1:-1].round().long()
            anchor = torch.isin(positions, chosen)
        weights[anchor & ~tail] = 1.0
        return weights


class FirstDecodeSteps(EveryQuery, kind="first_decode_steps"):
    """The queries of the first n decode steps; needs the schedule `after_decode_steps` with the same n."""

    source: ClassVar[str] = "arXiv 2605.08234 section 2, Stage I repair (delayed eviction)"
    origin: ClassVar[Origin] = "first_decode_steps"
    n: int = Field(default=8, ge=1)


class Reconstruction(EveryQuery, kind="reconstruction"):
    """The model's queries while it is made to repeat the context, in chunks over the full cache.

    Each chunk is fed as `instruction` + chunk; `continuation` with the chunk's preceding `hint_tokens` replaces the
    instruction from the second chunk on. Costs about one more prefill, and holds every layer's full cache meanwhile.
    """

    source: ClassVar[str] = "arXiv 2505.23416 (KVzip)"
    origin: ClassVar[Origin] = "reconstruction"
    chunk: int = Field(default=2048, ge=16)
    instruction: str = "\n\nRepeat the previous context exactly."
    continuation: str = "\n\nRepeat the part of the previous context exactly, starting with "
    hint_tokens: int = Field(default=8, ge=0)


class Oracle(EveryQuery, kind="oracle"):
    """The queries of a reference continuation, which the caller gives (`reference=` of compress): an upper bound."""

    source: ClassVar[str] = "arXiv 2605.08234 section 2 (p*, the decode access law)"
    origin: ClassVar[Origin] = "oracle"
