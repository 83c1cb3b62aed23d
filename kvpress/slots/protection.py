"""Slot `protection`: tokens that are never evicted. They count towards the budget."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvpress.slots.base import Choice


class Protection(Choice, slot="protection"):
    """Base of the protections."""

    def mask(self, positions: Tensor, n_seen: int, budget: int) -> Tensor:
        """Which stored tokens are protected.

        Args:
            positions: [...] int64, position of each stored token counted from the sequence's first real token.
            n_seen: real tokens seen so far.
            budget: tokens per KV head that may stay.

        Returns:
            [...] bool.
        """
        raise NotImplementedError


class Standard(Protection, kind="standard"):
    """The first `sinks` tokens, the last `recent` tokens (or a share of the budget) and explicit spans."""

    source: ClassVar[str] = (
        "sinks: arXiv 2309.17453; recent: arXiv 2404.14469; recent share: arXiv 2306.14048 (H2O: one half)"
    )
    sinks: int = Field(default=0, ge=0)
    recent: int = Field(default=0, ge=0)
    recent_share: float = Field(default=0.0, ge=0, le=1)
    spans: tuple[tuple[int, int], ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Standard:
        if self.recent and self.recent_share:
            raise ValueError("give 'recent' tokens or 'recent_share' of the budget, not both")
        for start, end in self.spans:
            if not 0 <= start < end:
                raise ValueError(f"span [{start}, {end}) is empty or negative")
        return self

    def mask(self, positions: Tensor, n_seen: int, budget: int) -> Tensor:
        recent = self.recent or int(self.recent_share * budget + 1e-9)
        mask = (positions < self.sinks) | (positions >= n_seen - recent)
        for start, end in self.spans:
            mask |= (positions >= start) & (positions < end)
        return mask


class NoProtection(Protection, kind="none"):
    """Every token can be evicted."""

    source: ClassVar[str] = "ablation"

    def mask(self, positions: Tensor, n_seen: int, budget: int) -> Tensor:
        return torch.zeros_like(positions, dtype=torch.bool)
