"""One sample of a run in detail: its text with what was kept, evicted and asked for, and why the arm lost it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from kvpress.errors import InputError
from kvpress.loading import load_tokenizer
from kvpress.prompt import context_length
from kvpress_eval import manifest as manifests
from kvpress_eval.data import Data
from kvpress_eval.diagnostic.finding import Finding, finding_of, unpack_counts
from kvpress_eval.diagnostic.study import Comparison, Study
from kvpress_eval.prompt import Prompt
from kvpress_eval.records import FULL, Record, read_run
from kvpress_eval.runner import read_task, tasks_of
from kvpress_eval.sweep import Sweep, parse_sweep
from kvpress_eval.units import Item

#: a token is called kept where most heads keep it, and evicted where none does
MOST = 0.5


@dataclass(frozen=True)
class Piece:
    """A run of tokens with the same fate. share: mean share of heads that keep them; gold: of the evidence; part: "context", or
    "question" for what stands behind it. first: index of its first token; n: tokens."""

    text: str
    share: float
    gold: bool
    part: str
    first: int
    n: int

    @property
    def fate(self) -> str:
        """ "kept" by most heads, by "some", or "evicted" by all."""
        return "kept" if self.share >= MOST else "some" if self.share > 0 else "evicted"


@dataclass(frozen=True)
class Explanation:
    """A failing (or not failing) sample under one arm, next to the full cache. base: the answer of the contract that the arm differs from, in
    `slots`; None for the host."""

    record: Record
    full: Record
    base: Record | None
    slots: tuple[str, ...]
    finding: Finding
    pieces: list[Piece]


def explain(
    folder: Path,
    sample: str,
    *,
    arm: str | None = None,
    task: str | None = None,
    length: int | None = None,
    mode: str | None = None,
) -> Explanation:
    """Explain one sample of a run; the model's weights are not needed.

    sample: its id, or "task/sample", the task with or without its family. arm: with budget; by default one with a verdict on a failure, the
        host before others. task, length, mode: where several have the sample.

    Raises:
        InputError: there is no such sample or arm, several are meant, it was not measured, or its prompt is not what it was.
    """
    everything = read_run(folder)
    records = [
        one
        for one in everything
        if _is(one, sample, task) and length in (None, one.length) and mode in (None, one.mode)
    ]
    if not records:
        known = list(dict.fromkeys(f"{one.task}/{one.sample}" for one in everything))
        raise InputError(
            f"'{folder}' has no sample '{sample}'"
            + (f" in task '{task}'" if task else "")
            + f"; it has {len(known)} samples, such as {', '.join(known[:3])}"
        )
    for name in ("task", "length", "mode"):
        found = dict.fromkeys(str(getattr(one, name)) for one in records)
        if len(found) > 1:
            raise InputError(f"sample '{sample}' is there for {name} {' and '.join(found)}: say which with --{name}")
    manifest = manifests.read(folder)
    sweep = parse_sweep(manifest["sweep"], f"'{folder / manifests.NAME}'")
    record = _choose(records, arm, sample, sweep.host_name if isinstance(sweep, Study) else None)
    finding = finding_of(record)
    assert finding is not None
    full = next(one for one in records if one.arm == FULL)
    item, tokenizer = _item(sweep, record)
    if item.prompt.sha != record.prompt_sha:
        raise InputError(
            f"the prompt of '{sample}' is not what it was when the run was made: the task or its data have changed"
        )
    comparison = _comparison(sweep, record)
    base = None if comparison is None else f"{comparison.base}@{record.budget}"
    return Explanation(
        record=record,
        full=full,
        base=next((one for one in records if one.arm == base), None),
        slots=() if comparison is None else comparison.slots,
        finding=finding,
        pieces=list(pieces(tokenizer, item.prompt, finding)),
    )


def _is(record: Record, sample: str, task: str | None) -> bool:
    named = task is None or task in (record.task, record.task.rpartition("/")[2])
    short = record.task.rpartition("/")[2]
    return named and sample in (record.sample, f"{record.task}/{record.sample}", f"{short}/{record.sample}")


def _choose(records: Sequence[Record], arm: str | None, sample: str, host: str | None) -> Record:
    measured = [
        (one, finding) for one in records if (finding := finding_of(one)) is not None and finding.access is not None
    ]
    if not measured:
        raise InputError(
            f"sample '{sample}' has no finding: it is of a run of `kvpress eval`, not of `kvpress diagnose`"
        )
    names = [one.arm for one, _ in measured]
    if arm is not None:
        if arm not in names:
            raise InputError(f"there is no arm '{arm}' on sample '{sample}': it has {', '.join(dict.fromkeys(names))}")
        return next(one for one, _ in measured if one.arm == arm)
    failing = [one for one, finding in measured if finding.verdict not in (None, "none")]
    # a study is about its host; records are in the order of their names, which says nothing
    return min(failing or [one for one, _ in measured], key=lambda one: one.contract != host)


def _comparison(sweep: Sweep, record: Record) -> Comparison | None:
    """What the record's arm was compared with."""
    found = sweep.comparisons if isinstance(sweep, Study) else ()
    return next((one for one in found if one.arm == record.contract), None)


def _item(sweep: Sweep, record: Record) -> tuple[Item, PreTrainedTokenizerBase]:
    """The sample as the task makes it, with its prompt."""
    tokenizer, config = load_tokenizer(sweep.model)
    data = Data([Path(place) for place in sweep.data])
    for choice in sweep.tasks:
        for task in tasks_of(choice):
            if task.name == record.task and record.length == (choice.length if task.needs_length else None):
                wanted = choice.limit or sweep.limit
                items = read_task(sweep, choice, task, tokenizer, data, context_length(config), wanted)
                found = next((item for item in items if item.sample.id == record.sample), None)
                if found is not None:
                    return found, tokenizer
    raise InputError(f"the run's sweep no longer makes sample '{record.sample}' of '{record.task}'")


def pieces(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, finding: Finding) -> Iterator[Piece]:
    """The prompt cut where fate, evidence or part changes; texts are decoded piece by piece."""
    n = len(prompt.ids)
    counts = np.full(n, finding.heads) if finding.kept is None else _padded(finding, prompt)
    share = counts / finding.heads
    gold = np.zeros(n, dtype=bool)
    for start, end in finding.gold:
        gold[start:end] = True
    behind = np.arange(n) >= prompt.n_context
    fate = np.where(share >= MOST, 2, np.where(share > 0, 1, 0))
    key = fate * 4 + gold * 2 + behind
    edges = [0, *(np.flatnonzero(np.diff(key)) + 1).tolist(), n]
    for start, end in pairwise(edges):
        yield Piece(
            text=str(tokenizer.decode(list(prompt.ids[start:end]))),
            share=float(share[start:end].mean()),
            gold=bool(gold[start]),
            part="question" if behind[start] else "context",
            first=start,
            n=end - start,
        )


def _padded(finding: Finding, prompt: Prompt) -> NDArray[np.int64]:
    """Counts of the whole prompt; in query-agnostic mode what stands behind the context is kept by every head."""
    assert finding.kept is not None
    n = len(prompt.ids)
    for n_cut in (n, prompt.n_context):
        try:
            counts = unpack_counts(finding.kept, n_cut)
        except InputError:
            continue
        return np.concatenate([counts, np.full(n - n_cut, finding.heads)])
    raise InputError("the kept tokens of this record do not fit its prompt: measure the sample again")
