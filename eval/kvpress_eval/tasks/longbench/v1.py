"""LongBench v1 and LongBench-E: `longbench/<name>` and `longbench-e/<name>_e`.

The template is cut at the context, so that nothing but the context is ever truncated; joined again, lead, context and
question are the official prompt. Data is put in by splitting, never by formatting: contexts are full of braces.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice

from kvpress.errors import InputError
from kvpress_eval.prompts import load_prompts
from kvpress_eval.sample import Sample
from kvpress_eval.tasks.base import Request, Task, register
from kvpress_eval.tasks.longbench.rows import Row, read_rows
from kvpress_eval.tasks.longbench.sets import SETS, LongBenchSet

#: shorter answers ("yes", "no", "12") are in any long text by chance
_SHORTEST_EVIDENCE = 4


#: items of an E split that has not 300
EXTENDED_ITEMS = {"qasper": 224, "multifieldqa_en": 150, "multi_news": 294}


class LongBench(Task):
    """One data set, whole or as its E split."""

    def __init__(self, data_set: LongBenchSet, *, extended: bool) -> None:
        self.data_set = data_set
        self.extended = extended
        self.file = data_set.name + "_e" * extended
        self.family = "longbench-e" if extended else "longbench"
        self.name = f"{self.family}/{self.file}"
        split = "bucketed by length" if extended else f"{data_set.items} items"
        language = "Chinese " if data_set.chinese else ""
        self.description = f"{language}{data_set.kind}, {split}, {data_set.metric}"
        # the published averages that compression methods are compared on are over the sets that are not Chinese
        self.in_macro = not data_set.chinese and data_set.name != "passage_count"
        self.caveat = _caveat(data_set)
        self.official = EXTENDED_ITEMS.get(data_set.name, 300) if extended else data_set.items

    def samples(self, request: Request) -> Iterator[Sample]:
        ids: Counter[str] = Counter()
        for row in islice(read_rows(request.data, self.file), request.limit):
            ids[row.id] += 1
            # nothing forbids two rows with one _id, but records are told apart by it
            yield self._sample(row, row.id if ids[row.id] == 1 else f"{row.id}#{ids[row.id]}")

    def _sample(self, row: Row, name: str) -> Sample:
        lead, question = split_prompt(load_prompts("longbench")[self.data_set.name], row.input)
        if self.data_set.metric.startswith("classification") and not row.all_classes:
            raise InputError(f"row '{row.id}' of {self.file}.jsonl has no all_classes, which its metric needs")
        meta = {"length": row.length, "language": row.language}
        if self.extended:
            meta["bucket"] = bucket(row.length)
        return Sample(
            id=name,
            cluster=hashlib.sha256(row.context.encode()).hexdigest()[:16],
            lead=lead,
            context=row.context,
            question=question,
            answer_prefix="",
            answers=row.answers,
            metric=self.data_set.metric,
            max_new_tokens=self.data_set.max_new_tokens,
            chat=self.data_set.chat,
            stop_at_newline=self.data_set.name == "samsum",
            all_classes=row.all_classes or (),
            evidence=_spans(row) if self.data_set.spans else (),
            any_evidence=True,
            meta=meta,
        )


def split_prompt(template: str, query: str) -> tuple[str, str]:
    """The text in front of the context, and the text behind it with the query filled in."""
    lead, question = template.split("{context}")
    return lead, question.replace("{input}", query)


def bucket(length: int) -> str:
    """LongBench-E's name for a length."""
    return "0-4k" if length < 4000 else "4-8k" if length < 8000 else "8k+"


def _spans(row: Row) -> tuple[str, ...]:
    """The answers that the context holds literally: if none of them is left, truncation has made the item unanswerable."""
    return tuple(
        answer for answer in dict.fromkeys(row.answers) if len(answer) >= _SHORTEST_EVIDENCE and answer in row.context
    )


def _caveat(data_set: LongBenchSet) -> str:
    if data_set.name == "passage_count":
        return "known models score 2 to 6 points here, which is noise: not part of the macro average"
    if data_set.chinese:
        return (
            "Chinese set: not part of the macro average, which is over the other languages as in published comparisons"
        )
    if data_set.kind == "code":
        return "official line rule: an answer that begins with a blank line scores near 0 (code_sim-v6line skips it)"
    return ""


for _set in SETS:
    register(LongBench(_set, extended=False))
for _set in SETS:
    if _set.extended:
        register(LongBench(_set, extended=True))
