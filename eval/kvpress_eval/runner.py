"""One process of a run: it answers the units of its shard that have no records yet, and appends a record for each answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpress.errors import InputError
from kvpress.loading import load
from kvpress.prompt import context_length
from kvpress.support import cache_layers, check_contract_fits
from kvpress_eval import manifest as manifests
from kvpress_eval.arms import FULL_REPEAT_ARM, Arm
from kvpress_eval.data import Data
from kvpress_eval.engine import Answer, Engine
from kvpress_eval.records import Key, Mode, Record, RecordFile, read_run
from kvpress_eval.scorers import find_scorer
from kvpress_eval.sweep import Sweep, TaskChoice, parse_sweep
from kvpress_eval.tasks import Request, Task, find_tasks
from kvpress_eval.units import WHOLE, Item, Shard, Unit, make_units, read_items

#: called with (task at its length, mode, items of this shard that are done, all of them) before each unit and at the end
Progress = Callable[[str, Mode, int, int], None]

#: of the question and the answer prefix that a record shows
QUESTION_CHARACTERS = 400


@dataclass
class Runner:
    """A model, its sweep and the folder of its records; `run` does the work of one shard."""

    sweep: Sweep
    folder: Path | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    arms: list[Arm]
    data: Data
    manifest: dict[str, Any]

    @classmethod
    def begin(cls, sweep: Sweep, folder: Path, device: str | None = None) -> Runner:
        """Load the model of a new run and write its manifest.

        Raises:
            KvpressError: the folder holds a run already, or model, contract or task are missing or wrong.
        """
        if (folder / manifests.NAME).exists():
            raise InputError(
                f"'{folder}' holds a run already: `kvpress {sweep.command} resume {folder}` goes on with it"
            )
        if any(folder.glob("records*.jsonl")):
            raise InputError(f"'{folder}' holds records but no {manifests.NAME}: begin the run in an empty folder")
        runner = cls.open(sweep, folder, device)
        for _ in runner.read_tasks(limit=1):  # what is wrong with the last task must not come out after hours
            pass
        manifests.write(folder, runner.manifest)
        return runner

    @classmethod
    def resume(cls, folder: Path, device: str | None = None) -> Runner:
        """Load the model of a run that was begun.

        Raises:
            KvpressError: there is no run, or its model, tokenizer or contracts are not what they were.
        """
        old = manifests.read(folder)
        runner = cls.open(parse_sweep(old["sweep"], f"'{folder / manifests.NAME}'"), folder, device)
        manifests.check_same(old, runner.manifest, folder)
        here = runner.manifest["software"][0]

        def note(manifest: dict[str, Any]) -> None:
            if here not in manifest["software"]:
                manifest["software"].append(here)

        runner.manifest = manifests.update(folder, note)
        return runner

    @classmethod
    def open(cls, sweep: Sweep, folder: Path | None, device: str | None = None) -> Runner:
        """Load the model and check what can be checked before the first prompt; nothing is written."""
        arms = sweep.arms()
        _check_tasks(sweep)
        model, tokenizer = load(sweep.model, dtype=sweep.dtype, device=device)
        for arm in arms:
            assert arm.contract is not None
            check_contract_fits(arm.contract, model, cache_layers(model)[1], torch.zeros(1, 1, dtype=torch.long))
        data = Data([Path(place) for place in sweep.data])
        return cls(sweep, folder, model, tokenizer, arms, data, manifests.describe(sweep, arms, model, tokenizer))

    def run(self, shard: Shard = WHOLE, progress: Progress | None = None) -> int:
        """Answer what this shard has no records of; the number of new records.

        Raises:
            KvpressError: data are missing or wrong, a prompt does not fit, a contract cannot be met, or the disk is full.
                What is recorded stays, and the run can be resumed.
        """
        n_new, engine = 0, self.engine()
        assert self.folder is not None
        with RecordFile(self.folder / shard.file_name) as file:
            done = self._done()
            for task, length, items in self.read_tasks():
                repeated = {item.sample.id for item in items[: self.sweep.noise_floor]}
                for mode in self.sweep.modes:
                    units = list(shard.of(make_units(task, length, mode, items, engine.shares_contexts)))
                    n_items, n_done = sum(len(unit.items) for unit in units), 0
                    for unit in units:
                        if progress is not None:
                            progress(task_key(task.name, length), mode, n_done, n_items)
                        repeat = repeated if mode == self.sweep.modes[0] else set()
                        records = self.missing(engine, unit, repeat, done)
                        file.append(records)
                        n_new, n_done = n_new + len(records), n_done + len(unit.items)
                    if progress is not None:
                        progress(task_key(task.name, length), mode, n_done, n_items)
        return n_new

    def _done(self) -> dict[Key, str]:
        """Keys of the records that are there, with the digest of their prompt.

        Raises:
            InputError: they are of another run.
        """
        assert self.folder is not None
        found = {}
        for record in read_run(self.folder):
            if record.run != self.manifest["run"]:
                raise InputError(
                    f"'{self.folder}' holds records of run {record.run}, its manifest is of run {self.manifest['run']}: "
                    f"take them apart"
                )
            found[record.key] = record.prompt_sha
        return found

    def engine(self, arms: Sequence[Arm] | None = None) -> Engine:
        """What answers prompts under these arms, by default all of the sweep."""
        return self.sweep.engine(self.model, self.tokenizer, self.arms if arms is None else arms)

    def read_tasks(self, limit: int | None = None) -> Iterator[tuple[Task, int | None, list[Item]]]:
        """Every task of the sweep with its samples, read when its turn comes; with `limit` only so many, for a look."""
        context = context_length(self.model.config)
        for choice in self.sweep.tasks:
            for task in tasks_of(choice):
                wanted = limit or choice.limit or self.sweep.limit
                length = choice.length if task.needs_length else None
                items = read_task(self.sweep, choice, task, self.tokenizer, self.data, context, wanted)
                if limit is None:
                    facts = {"n": len(items), "official": task.official, "caveat": task.caveat}
                    self._note_task(task_key(task.name, length), facts, self.sweep.notes(task.name, items))
                yield task, length, items

    def _note_task(self, key: str, facts: dict[str, Any], notes: dict[str, dict[str, Any]]) -> None:
        """Put a task's facts, the sweep's notes on it and the data files that it has read into the manifest."""

        def note(manifest: dict[str, Any]) -> None:
            manifests.check_data(manifest, self.data.used)
            manifest["tasks"][key] = facts
            for part, entries in notes.items():
                manifest.setdefault(part, {}).update(entries)

        if self.folder is not None:
            self.manifest = manifests.update(self.folder, note)

    def missing(self, engine: Engine, unit: Unit, repeated: Collection[str], done: Mapping[Key, str]) -> list[Record]:
        """Records of a unit that are not there yet. All arms run even if one record is missing: an arm's arithmetic
        depends, in the last bits, on the batch that it is decoded in.

        Raises:
            InputError: a sample was recorded with another prompt.
        """
        missing = []
        for item in unit.items:
            arms = [*engine.arms, *([FULL_REPEAT_ARM] if item.sample.id in repeated else [])]
            keys = [(unit.task.name, unit.length, item.sample.id, unit.mode, arm.name) for arm in arms]
            if any(done.get(key, item.prompt.sha) != item.prompt.sha for key in keys):
                raise InputError(
                    f"sample '{item.sample.id}' of '{unit.task.name}' is recorded with another prompt than it has now: the "
                    f"task or the chat template has changed, begin a new run"
                )
            missing.append([arm for arm, key in zip(arms, keys, strict=True) if key not in done])
        answers: list[dict[str, Answer]] = [{} for _ in unit.items]
        if any(arm is not FULL_REPEAT_ARM for arms in missing for arm in arms):
            prompts, samples = [item.prompt for item in unit.items], [item.sample for item in unit.items]
            found = engine.answer(prompts, samples, unit.mode == "query_aware")
            answers = [{arm.name: one for arm, one in zip(engine.arms, ones, strict=True)} for ones in found]
        for item, arms, ones in zip(unit.items, missing, answers, strict=True):
            if FULL_REPEAT_ARM in arms:
                ones[FULL_REPEAT_ARM.name] = engine.repeat_full(item.prompt, item.sample)
        return [
            make_record(self.manifest["run"], unit, item, arm, ones[arm.name])
            for item, arms, ones in zip(unit.items, missing, answers, strict=True)
            for arm in arms
        ]


def read_task(
    sweep: Sweep,
    choice: TaskChoice,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    context: int | None,
    limit: int | None,
) -> list[Item]:
    """The samples of one task of a sweep with their prompts. context: tokens that the model can read; limit: of samples."""
    length = choice.length if task.needs_length else None
    request = Request(tokenizer, data, length, limit, sweep.seed, sweep.chat)
    return read_items(task, request, metric=choice.metric, limit=sweep.max_length, context=context)


def tasks_of(choice: TaskChoice) -> Sequence[Task]:
    """The tasks that an entry of a sweep names.

    Raises:
        InputError: there is no such task or metric, or the task needs a length.
    """
    tasks = find_tasks(choice.task)
    if choice.metric is not None:
        find_scorer(choice.metric)
    if choice.length is None and any(task.needs_length for task in tasks):
        raise InputError(f"task '{choice.task}' is generated to a length: give one, for example length: 4096")
    return tasks


def _check_tasks(sweep: Sweep) -> None:
    """Raise InputError if a task does not exist, lacks its length, or is named twice."""
    seen = set()
    for choice in sweep.tasks:
        for task in tasks_of(choice):
            key = task_key(task.name, choice.length if task.needs_length else None)
            if key in seen:
                raise InputError(f"the sweep names task '{key}' twice: its records could not be told apart")
            seen.add(key)


def task_key(name: str, length: int | None) -> str:
    """How a manifest names a task at a length."""
    return name if length is None else f"{name}@{length}"


def make_record(run: str, unit: Unit, item: Item, arm: Arm, answer: Answer) -> Record:
    """Score an answer and put down everything that is known about it."""
    sample, prompt = item.sample, item.prompt
    scorer = find_scorer(sample.metric)
    score = scorer(answer.text, sample)
    return Record(
        run=run,
        task=unit.task.name,
        family=unit.task.family,
        length=unit.length,
        sample=sample.id,
        cluster=sample.cluster,
        mode=unit.mode,
        arm=arm.name,
        contract=arm.name if arm.contract is None else arm.contract.name,
        contract_id=None if arm.contract is None else arm.contract.id,
        budget=arm.budget,
        prompt_sha=prompt.sha,
        n_prompt=len(prompt.ids),
        n_context=prompt.n_context,
        n_cut=prompt.n_cut,
        evidence_left=prompt.evidence_left,
        question=(sample.question.rstrip() + sample.answer_prefix)[-QUESTION_CHARACTERS:],
        n_new=answer.n_new,
        stopped=answer.stopped,
        prediction=answer.text,
        answers=sample.answers,
        metric=sample.metric,
        scorer=f"{scorer.name} {scorer.version}",
        score=score.value,
        parts=score.parts,
        kept_bytes=answer.held.kept_bytes,
        full_bytes=answer.held.full_bytes,
        kept_share=answer.held.kept_share,
        output_change=answer.held.output_change,
        decode_rows=answer.decode_rows,
        flags=tuple(flags_of(item, answer)),
        meta=sample.meta,
        seconds=answer.seconds,
        measures=answer.measures,
    )


def flags_of(item: Item, answer: Answer) -> Iterator[str]:
    """What a reader of the score should know about this record."""
    yield from item.prompt.flags
    if item.prompt.n_cut:
        yield "truncated"
    if item.prompt.evidence_left is not None and item.prompt.evidence_left < 1:
        yield "evidence_cut"
    if answer.stopped == "length":
        yield "stopped_by_length"
    if not answer.text.strip():
        yield "empty_answer"
