"""Slot `schedule`: when the cache is brought down to its budget."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from kvpress.slots.base import Choice


class Schedule(Choice, slot="schedule"):
    """Base. A decode step is one token that was accepted after the prompt."""

    evicts_at_prefill_end: ClassVar[bool] = True
    evicts_between_chunks: ClassVar[bool] = False
    evicts_in_decode: ClassVar[bool] = False

    def expects_eviction(self, steps_at_last_eviction: int | None) -> bool:
        """Whether decode steps may still end in an eviction, so that their queries must be kept."""
        return self.evicts_in_decode

    def due(self, decode_steps: int, steps_at_last_eviction: int | None) -> bool:
        """Whether to evict before the next decode step.

        Args:
            decode_steps: tokens accepted since the prompt ended.
            steps_at_last_eviction: `decode_steps` at the last eviction, None if there was none in this turn.
        """
        return False


class EndOfPrefill(Schedule, kind="end_of_prefill"):
    """Once, layer by layer, as soon as the prompt has been read; generated tokens are all kept."""

    source: ClassVar[str] = "arXiv 2404.14469 (SnapKV)"


class PerPrefillChunk(Schedule, kind="per_prefill_chunk"):
    """After every chunk of a chunked prefill (`prefill_chunk_size` of generate), so that the peak is bounded."""

    source: ClassVar[str] = "ours; the published selectors read the whole prompt first"
    evicts_between_chunks: ClassVar[bool] = True


class AfterDecodeSteps(Schedule, kind="after_decode_steps"):
    """Once, after n decode steps over the full cache (delayed eviction: their queries can be the evidence)."""

    source: ClassVar[str] = "arXiv 2605.08234 section 2, Stage I repair"
    evicts_at_prefill_end: ClassVar[bool] = False
    evicts_in_decode: ClassVar[bool] = True
    n: int = Field(default=8, ge=1)

    def expects_eviction(self, steps_at_last_eviction: int | None) -> bool:
        return steps_at_last_eviction is None

    def due(self, decode_steps: int, steps_at_last_eviction: int | None) -> bool:
        return steps_at_last_eviction is None and decode_steps >= self.n


class EveryDecodeSteps(Schedule, kind="every_decode_steps"):
    """At the end of the prompt and again every n decode steps, so that a long answer stays within the budget."""

    source: ClassVar[str] = "arXiv 2306.14048 (H2O) evicts at every step; n > 1 amortises it"
    evicts_in_decode: ClassVar[bool] = True
    n: int = Field(default=64, ge=1)

    def due(self, decode_steps: int, steps_at_last_eviction: int | None) -> bool:
        return decode_steps - (steps_at_last_eviction or 0) >= self.n
