"""Records: one line of JSON for each (sample, arm), appended and flushed as it is made.

A record never changes once it is written. Everything that depends on the clock is in `seconds`; all other fields of a
resumed run equal those of an unbroken one.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kvpress.errors import InputError

Mode = Literal["query_aware", "query_agnostic"]
Stopped = Literal["eos", "length", "newline"]
#: (task, length, sample, mode, arm)
Key = tuple[str, int | None, str, str, str]
#: name of the arm that keeps everything; it runs on every sample of every sweep
FULL = "full"
#: the full cache once more, through other kernels and another batch shape: what differs is the run's noise floor
FULL_REPEAT = "full_repeat"


class Seconds(BaseModel):
    """What one arm cost. prefill is that of the shared forward pass; evidence and eviction are this arm's own.

    decode: from the first new token to this arm's last; the rows of a batch share it (see Record.decode_rows).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    prefill: float
    evidence: float
    eviction: float
    decode: float


class Record(BaseModel):
    """One answer under one arm, with its score and its cost.

    run: digest of what the run was begun with (`manifest.run_digest`), so that records of two runs are never mixed.
    task, length, sample, mode, arm: together unique within a run. length is the requested one, None for sets with
        lengths of their own. arm: "full", "full_repeat" or "<contract>@<budget>".
    contract_id: of the whole contract, budget included. family, cluster, meta: see Task and Sample.
    prompt_sha: of the token ids. n_prompt: tokens of the prompt; n_context: of these, lead and context; n_cut: tokens
        that middle truncation took out of the context; evidence_left: share of the sample's evidence strings that are
        still in the prompt, None where the benchmark names none.
    question: the last characters of what stands behind the context, for readers.
    n_new: generated tokens, the stopping one included. stopped: why generation ended.
    score: in [0, 1]; parts: partial scores such as one per depth. scorer: metric and version.
    kept_bytes: measured bytes of the cache when the whole prompt has been read and the cut is done; in query-agnostic
        mode question and answer prefix are in it, in full. full_bytes: of the full cache then; kept_share: kept tokens /
        prompt tokens, mean over heads. output_change: mean over layers of the relative change of
        the newest query's attention output by the eviction, None where nothing was evicted.
    decode_rows: arms that were decoded in one batch with this one. flags: what is wrong or odd about this record.
    measures: what a diagnostic found (`kvpress_eval.diagnostic.finding`), empty in other runs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    run: str
    task: str
    family: str
    length: int | None
    sample: str
    cluster: str
    mode: Mode
    arm: str
    contract: str
    contract_id: str | None
    budget: str | None
    prompt_sha: str
    n_prompt: int
    n_context: int
    n_cut: int
    evidence_left: float | None
    question: str
    n_new: int
    stopped: Stopped
    prediction: str
    answers: tuple[str, ...]
    metric: str
    scorer: str
    score: float
    parts: dict[str, float]
    kept_bytes: int
    full_bytes: int
    kept_share: float
    output_change: float | None
    decode_rows: int
    flags: tuple[str, ...]
    meta: dict[str, Any]
    seconds: Seconds
    measures: dict[str, Any] = {}

    @property
    def key(self) -> Key:
        """What makes a record unique within its run."""
        return self.task, self.length, self.sample, self.mode, self.arm


class RecordFile:
    """An append-only file of records (or of other models, one a line), for one process at a time. Opening it cuts off a last line that is no whole record.

    Raises:
        InputError: another process writes to it.
    """

    def __init__(self, path: Path, kind: type[BaseModel] = Record) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise InputError(f"another process writes to '{path}': wait for it, or stop it and resume") from None
        _drop_broken_end(path, kind)

    def append(self, records: Iterable[BaseModel]) -> None:
        """Write records, each a line of its own, through to the disk.

        Raises:
            InputError: the disk does not take them; what was written of a line is taken back.
        """
        for record in records:
            line, start = record.model_dump_json().encode() + b"\n", os.fstat(self._file).st_size
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._file, line[written:])
                os.fsync(self._file)
            except OSError as error:
                os.ftruncate(self._file, start)
                raise InputError(
                    f"cannot write to '{self.path}': {error.strerror}; free some space and resume"
                ) from error

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_records(path: Path) -> Iterator[Record]:
    """Records of one file; a last line that is no whole record, as a crash leaves it, is left out.

    Raises:
        InputError: a line before the last one is no record, or the file is missing.
    """
    if not path.is_file():
        raise InputError(f"there are no records at '{path}'")
    broken: InputError | None = None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if broken is not None:
                raise broken
            record, why = _parse(line)
            if record is not None:
                yield record
            else:
                broken = InputError(
                    f"'{path}' line {number} is no record ({why}): delete that line and resume, its sample is answered again"
                )


def _is_whole(line: bytes, kind: type[BaseModel]) -> bool:
    try:
        kind.model_validate_json(line)
    except ValidationError:
        return False
    return line.endswith(b"\n")


def _parse(line: bytes) -> tuple[Record | None, str]:
    """The record in a line, or why there is none."""
    if not line.endswith(b"\n"):
        return None, "it has no end"
    try:
        return Record.model_validate_json(line), ""
    except ValidationError as error:
        first = error.errors()[0]
        return None, f"{'.'.join(map(str, first['loc'])) or 'line'}: {first['msg']}"


def read_run(folder: Path) -> list[Record]:
    """All records of a run, over its shards, in a fixed order; a record that two shards made is there once.

    Raises:
        InputError: the folder holds no records, or a line in it is none.
    """
    files = sorted(folder.glob("records*.jsonl"))
    if not files:
        raise InputError(f"'{folder}' holds no run: there is no records*.jsonl in it")
    found = {record.key: record for file in files for record in read_records(file)}
    return [found[key] for key in sorted(found, key=lambda key: json.dumps(key))]


def _drop_broken_end(path: Path, kind: type[BaseModel]) -> None:
    """Cut off a last line that is no whole record; what stands before it is whole, or a reader will say so."""
    content = path.read_bytes()
    start = content.rfind(b"\n", 0, max(len(content) - 1, 0)) + 1
    if content and not _is_whole(content[start:], kind):
        with path.open("r+b") as file:
            file.truncate(start)
