"""One item of a benchmark, cut into the segments that a run must tell apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: metrics under which an answer must hold every reference, not one of them
ALL_ANSWERS = frozenset({"ruler_all", "needle_parallel"})


@dataclass(frozen=True)
class Sample:
    """What is asked, what would be right, and how the answer is scored.

    The user's turn is `lead + context + question`; `answer_prefix` is the forced beginning of the model's answer, so
    it stands behind the assistant's header where there is a chat template.

    id: unique within its task, the same in every run with the same seed and length.
    cluster: items that share it are not independent of each other (same document, same needles); statistics resample
        clusters.
    lead: the template's text in front of the context. context: the only part that may be truncated.
    question: everything behind the context, the template's text included.
    answers: the references. metric: name in `kvpress_eval.scorers`. max_new_tokens: the benchmark's own limit.
    chat: False for sets that the benchmark feeds without a chat template.
    stop_at_newline: a newline ends the answer, but not before its first token (LongBench's samsum).
    all_classes: the labels of a classification set.
    reference: what a right answer looks like as a text, where joining the answers does not say it.
    evidence: substrings of the context that the answer needs, one per fact (needles, gold paragraphs); empty if the
        benchmark does not say. any_evidence: any one of them is enough. meta: what reports group by, for example {"depth": 40, "length": 4096}.
    """

    id: str
    cluster: str
    lead: str
    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    metric: str
    max_new_tokens: int
    chat: bool = True
    stop_at_newline: bool = False
    all_classes: tuple[str, ...] = ()
    reference: str = ""
    evidence: tuple[str, ...] = ()
    any_evidence: bool = False
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def right_answer(self) -> str:
        """A right answer as a text: the reference, all answers where all are asked for, else the first one."""
        if self.reference:
            return self.reference
        return ", ".join(self.answers) if self.metric.split("-")[0] in ALL_ANSWERS else self.answers[0]

    @property
    def text(self) -> str:
        """The user's turn."""
        return self.lead + self.context + self.question
