"""Units of work: the samples that share one reading of their context, and which of them a process still has to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from kvpress.errors import InputError
from kvpress_eval.prompt import Prompt, render
from kvpress_eval.records import Mode
from kvpress_eval.sample import Sample
from kvpress_eval.scorers import find_scorer
from kvpress_eval.tasks import Request, Task


@dataclass(frozen=True)
class Item:
    """A sample with its prompt."""

    sample: Sample
    prompt: Prompt


@dataclass(frozen=True)
class Unit:
    """Items that are answered together, always all of them: what a batch holds must not depend on what is already done."""

    task: Task
    length: int | None
    mode: Mode
    items: tuple[Item, ...]


def read_items(
    task: Task, request: Request, *, metric: str | None = None, limit: int | None = None, context: int | None = None
) -> list[Item]:
    """All samples of a task with their prompts.

    metric: scores them instead of the benchmark's own.
    limit: tokens to which prompts of sets with lengths of their own are truncated, room for the answer included; tasks
        that are generated to a length are never truncated. context: the model's context.

    Raises:
        InputError: data is missing or wrong, two samples have one id, or a prompt is longer than the model's context.
    """
    items, ids = [], set()
    for sample in task.samples(request):
        if metric is not None:
            sample = replace(sample, metric=metric)
            _check_metric(task, sample)
        if sample.id in ids:
            raise InputError(f"task '{task.name}' has sample '{sample.id}' twice")
        ids.add(sample.id)
        room = min((n for n in (limit, context) if n is not None), default=None)
        truncate = room is not None and not task.needs_length
        prompt = render(
            request.tokenizer,
            sample,
            chat=request.chat,
            max_tokens=room - sample.max_new_tokens if truncate and room is not None else None,
        )
        needed = len(prompt.ids) + sample.max_new_tokens - 1  # the last token is never read
        if context is not None and needed > context:
            raise InputError(
                f"task '{task.name}' sample '{sample.id}' needs {needed:,} tokens with its answer, but the model's context is "
                f"{context:,}: use a shorter length"
            )
        items.append(Item(sample, prompt))
    if not items:
        raise InputError(f"task '{task.name}' has no samples")
    return items


def _check_metric(task: Task, sample: Sample) -> None:
    """Raise InputError for a metric that reads what this task's samples do not have."""
    try:
        find_scorer(sample.metric)("", sample)
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(
            f"metric '{sample.metric}' cannot score task '{task.name}': its samples lack {error}"
        ) from None


def make_units(task: Task, length: int | None, mode: Mode, items: Sequence[Item], share: bool) -> list[Unit]:
    """Items in units; with `share`, query-agnostic items with the same context are one unit."""
    if mode == "query_aware" or not share:
        return [Unit(task, length, mode, (item,)) for item in items]
    groups: dict[tuple[str, int], list[Item]] = {}
    for item in items:
        groups.setdefault((item.prompt.context_sha, item.prompt.n_context), []).append(item)
    return [Unit(task, length, mode, tuple(group)) for group in groups.values()]


@dataclass(frozen=True)
class Shard:
    """Share i of n of the units, counted from 1."""

    i: int = 1
    n: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "i/n".

        Raises:
            InputError: it is not of that form.
        """
        parts = text.split("/")
        if len(parts) == 2 and all(part.isdecimal() for part in parts):
            i, n = map(int, parts)
            if 1 <= i <= n:
                return cls(i, n)
        raise InputError(f"shard '{text}' is not understood: use for example 2/4, the second of four")

    def of(self, units: Iterable[Unit]) -> Iterator[Unit]:
        """This shard's units; neighbours go to different shards, so that all have equally much to do."""
        return (unit for index, unit in enumerate(units) if index % self.n == self.i - 1)

    @property
    def file_name(self) -> str:
        """Of the shard's records."""
        return "records.jsonl" if self.n == 1 else f"records-{self.i}of{self.n}.jsonl"


WHOLE = Shard()
