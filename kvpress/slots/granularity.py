"""Slot `granularity`: the unit that is kept or evicted as a whole."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from kvpress.slots.base import Choice


class Granularity(Choice, slot="granularity"):
    """Base: a unit is a run of `block_size` consecutive positions, counted from the first real token."""

    @property
    def block_size(self) -> int:
        """Tokens in a full unit."""
        raise NotImplementedError


class Token(Granularity, kind="token"):
    """Every token is decided by itself."""

    source: ClassVar[str] = "arXiv 2404.14469 (SnapKV)"

    @property
    def block_size(self) -> int:
        return 1


class Block(Granularity, kind="block"):
    """Blocks of p consecutive tokens of the original sequence; the last may be short."""

    source: ClassVar[str] = "arXiv 2605.08234 section 3; p is not disclosed there, 16 fits its Fig. 4"
    size: int = Field(default=16, ge=2, le=4096)

    @property
    def block_size(self) -> int:
        return self.size
