"""What a reader must know before the numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpress_eval.records import Record
from kvpress_eval.report.plan import differs_from_published
from kvpress_eval.report.rows import MacroRow, Row
from kvpress_eval.statistics.interval import MIN_CLUSTERS

#: what the runner's flags mean
FLAGS = {
    "truncated": "records lost tokens to middle truncation",
    "evidence_cut": "records lost evidence that the answer needs before the model saw it, so no cache could have answered",
    "no_bos": "prompts do not begin with BOS: the tokenizer puts it in front of plain text, the chat template did not",
    "special_tokens_in_context": "contexts hold text that the tokenizer reads as control tokens, which the model may obey",
    "stopped_by_length": "answers were stopped by the length limit of their benchmark",
    "empty_answer": "answers are empty",
}


@dataclass(frozen=True)
class Problem:
    """A sentence, and how often it is true; None where it counts nothing."""

    count: int | None
    sentence: str

    @property
    def text(self) -> str:
        return self.sentence if self.count is None else f"{self.count:,} {self.sentence}"


def problems(
    rows: Sequence[Row],
    macro: Sequence[MacroRow],
    records: Sequence[Record],
    lonely: int,
    manifest: Mapping[str, Any],
) -> list[Problem]:
    """lonely: records of tasks without the full cache."""
    counts = [
        (
            sum(row.missing for row in rows),
            "samples of the full cache have no partner under an arm and enter no comparison",
        ),
        (
            sum(row.extra for row in rows),
            "samples of an arm have no partner with the full cache and enter no comparison",
        ),
        (lonely, "records belong to a task and mode without the full cache and are not shown"),
        (sum(row.incomplete for row in rows), "rows have fewer samples than planned and are marked incomplete"),
        (_without_interval(rows), f"rows have fewer than {MIN_CLUSTERS} clusters and no interval"),
    ]
    flags = Counter(flag for record in records for flag in record.flags)
    named = [Problem(flags.pop(flag), sentence) for flag, sentence in FLAGS.items() if flag in flags]
    return [
        *(Problem(None, sentence) for sentence in _unlike_published(rows, manifest)),
        *(Problem(count, sentence) for count, sentence in counts if count),
        *(Problem(None, sentence) for sentence in _macro_without_interval(rows, macro)),
        *named,
        *(Problem(count, f'records carry the flag "{flag}"') for flag, count in flags.most_common()),
    ]


def _without_interval(rows: Sequence[Row]) -> int:
    return sum(row.ci_low is None and row.delta is not None for row in rows)


def _macro_without_interval(rows: Sequence[Row], macro: Sequence[MacroRow]) -> Iterator[str]:
    """For each family with such rows, the tasks that have too few clusters."""
    for family in dict.fromkeys(row.family for row in macro if row.delta is not None and row.ci_low is None):
        few: dict[str, int] = {}
        for row in rows:
            if row.family == family and row.in_macro and row.delta is not None and row.n_clusters < MIN_CLUSTERS:
                few[row.task] = min(row.n_clusters, few.get(row.task, row.n_clusters))
        tasks = ", ".join(
            f"{task.rpartition('/')[2]} has {n} cluster{'s' * (n > 1)}" for task, n in sorted(few.items())
        )
        yield f"macro rows of {family} have no interval: {tasks}"


def _unlike_published(rows: Sequence[Row], manifest: Mapping[str, Any]) -> Iterator[str]:
    for family, task, length in dict.fromkeys((row.family, row.task, row.length) for row in rows):
        sentence = differs_from_published(manifest, family, task, length)
        if sentence is not None:
            yield sentence
