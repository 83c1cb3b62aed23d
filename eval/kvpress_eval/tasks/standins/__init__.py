"""Offline stand-ins for LongBench's families: `standin/standin_<name>`, built by `kvpress data build standins`.

The prompt, the metric, the answer's length and the chat rule are those of the LongBench set that a stand-in is like; its
data is not LongBench's, and neither are its scores.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from kvpress.errors import InputError
from kvpress_eval.data.standins import BUILD, STANDINS, Standin, cluster_of
from kvpress_eval.prompts import load_prompts
from kvpress_eval.sample import Sample
from kvpress_eval.tasks.base import Request, Task, register
from kvpress_eval.tasks.longbench.rows import MAX_ROW_BYTES, Row
from kvpress_eval.tasks.longbench.sets import SETS
from kvpress_eval.tasks.longbench.v1 import split_prompt

#: shorter answers are in any long text by chance
_SHORTEST_EVIDENCE = 4


class StandinTask(Task):
    """One stand-in."""

    family = "standin"

    def __init__(self, standin: Standin) -> None:
        self.like = next(data_set for data_set in SETS if data_set.name == standin.like)
        self.file = f"standins/{standin.name}.jsonl"
        self.name = f"standin/{standin.name}"
        self.description = f"{self.like.kind} as in {self.like.name}, other data, {self.like.metric}"
        self.caveat = standin.caveat
        self.in_macro = standin.in_macro

    def samples(self, request: Request) -> Iterator[Sample]:
        path = request.data.path(self.file, get=BUILD)
        for row in islice(read_rows(path), request.limit):
            if row.dataset != self.name.split("/")[1]:
                raise InputError(f"'{path}' holds '{row.dataset}', not this stand-in: build it with `{BUILD}`")
            lead, question = split_prompt(load_prompts("longbench")[self.like.name], row.input)
            yield Sample(
                id=row.id,
                cluster=cluster_of(row.id),
                lead=lead,
                context=row.context,
                question=question,
                answer_prefix="",
                answers=row.answers,
                metric=self.like.metric,
                max_new_tokens=self.like.max_new_tokens,
                chat=self.like.chat,
                all_classes=row.all_classes or (),
                evidence=self.evidence(row),
                any_evidence=True,
                meta={"length": row.length, "language": row.language},
            )

    def evidence(self, row: Row) -> tuple[str, ...]:
        """The paragraph that was asked for, or the answers that the context holds literally."""
        if self.like.metric == "retrieval":
            start = row.context.find(f"{row.answers[0]}: ")
            return (row.context[start:].split("\n\n", 1)[0],)
        if not self.like.spans:
            return ()
        spans = (answer for answer in dict.fromkeys(row.answers) if len(answer) >= _SHORTEST_EVIDENCE)
        return tuple(answer for answer in spans if answer in row.context)


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a stand-in's file.

    Raises:
        InputError: a line is none.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            try:
                row = Row.model_validate_json(line)
                if not re.fullmatch(r"[0-9a-f]{48}", row.id):
                    raise ValueError("its _id does not have 48 hex digits")
            except (ValidationError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise InputError(
                    f"'{path}' line {number} is no stand-in's row ({reason}): build it with `{BUILD}`"
                ) from None
            yield row


for _standin in STANDINS:
    register(StandinTask(_standin))
