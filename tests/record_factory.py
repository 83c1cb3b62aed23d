"""Synthetic records: single ones for hand-computed cases, and whole runs that look like real ones.

python tests/record_factory.py FOLDER   # writes a run of 13 tasks, 11 arms and two modes for the eye
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvpress_eval.records import FULL, FULL_REPEAT, Record, RecordFile, Seconds

FULL_BYTES = 25_165_824
RUN = "5a1f0c3e9b7d2468"


def record(task: str = "made/one", sample: str = "0", arm: str = FULL, score: float = 1.0, **changes: Any) -> Record:
    """One record; whatever is not given is plausible."""
    budget = arm.partition("@")[2] or None
    kept = 1.0 if budget is None else 0.25
    values: dict[str, Any] = {
        "run": RUN,
        "task": task,
        "family": task.partition("/")[0],
        "length": 2048,
        "sample": sample,
        "cluster": sample,
        "mode": "query_aware",
        "arm": arm,
        "contract": arm.partition("@")[0],
        "contract_id": None if budget is None else hashlib.sha256(arm.encode()).hexdigest(),
        "budget": budget,
        "prompt_sha": hashlib.sha256(f"{task} {sample}".encode()).hexdigest(),
        "n_prompt": 2000,
        "n_context": 1900,
        "n_cut": 0,
        "evidence_left": None,
        "question": "What is it?",
        "n_new": 12,
        "stopped": "eos",
        "prediction": "the answer",
        "answers": ("the answer",),
        "metric": "ruler_all",
        "scorer": "ruler_all/ruler-official",
        "score": score,
        "parts": {},
        "kept_bytes": int(FULL_BYTES * kept),
        "full_bytes": FULL_BYTES,
        "kept_share": kept,
        "output_change": None if budget is None else 0.1,
        "decode_rows": 4,
        "flags": (),
        "meta": {},
        "seconds": Seconds(prefill=1.2, evidence=0.1, eviction=0.02, decode=2.0),
    }
    return Record(**{**values, **changes})


def scores(task: str, arm: str, values: list[float], **changes: Any) -> list[Record]:
    """Records of one task and arm, samples 0, 1, ... with these scores."""
    return [record(task, str(index), arm, value, **changes) for index, value in enumerate(values)]


def small_run() -> list[Record]:
    """Two tasks of five items: the arm loses two of five in one, and all of the other."""
    full = scores("made/one", FULL, [1, 1, 1, 1, 0]) + scores("made/two", FULL, [1, 1, 1, 1, 1])
    return full + scores("made/one", "snapkv@25%", [1, 1, 0, 0, 0]) + scores("made/two", "snapkv@25%", [0] * 5)


#: task: (rate at which the full cache solves it, how much harder eviction hits it)
TASKS = {
    "ruler/niah_single_1": (1.0, 0.3),
    "ruler/niah_single_2": (0.97, 0.7),
    "ruler/niah_single_3": (0.9, 1.3),
    "ruler/niah_multikey_1": (0.85, 1.0),
    "ruler/niah_multikey_2": (0.6, 1.6),
    "ruler/niah_multikey_3": (0.25, 2.0),
    "ruler/niah_multivalue": (0.8, 1.0),
    "ruler/niah_multiquery": (0.8, 1.0),
    "ruler/vt": (0.35, 0.8),
    "ruler/cwe": (0.3, 0.6),
    "ruler/fwe": (0.5, 0.3),
    "ruler/qa_1": (0.55, 0.5),
    "ruler/qa_2": (0.02, 0.4),
}
NEEDLES = "needlebench-recipe/m_rt"
#: arm: strength of what it does to an answer
ARMS = {
    FULL: 0.0,
    FULL_REPEAT: 0.02,
    "kvzip@25%": 0.15,
    "snapkv@25%": 0.45,
    "adakv@25%": 0.35,
    "mii@25%": 0.12,
    "h2o@25%": 0.6,
    "h2o_debiased@25%": 0.5,
    "streaming_llm@25%": 0.9,
    "random@25%": 1.1,
    "oracle_mass@25%": 0.05,
}
GRADED = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}
MODES = ("query_aware", "query_agnostic")
DEPTHS = tuple(range(0, 101, 10))
HOSTILE = "<script>alert('a prediction is not markup')</script> & $x_1^2$ \u202e"


def synthetic_run(
    *,
    n_samples: int = 10,
    seed: int = 1,
    lengths: tuple[int, ...] = (2048,),
    tasks: Collection[str] = (*TASKS, NEEDLES),
) -> list[Record]:
    """A run in the manner of RULER and NeedleBench: abilities of arms and difficulty of items are shared."""
    random = np.random.default_rng(seed)
    return [one for one in _records(random, n_samples, lengths) if one.task in tasks]


def _records(random: np.random.Generator, n_samples: int, lengths: tuple[int, ...]) -> Iterator[Record]:
    for length in lengths:
        for task, (ability, frailty) in {**TASKS, NEEDLES: (0.8, 1.0)}.items():
            for sample in range(n_samples):
                units = 11 if task == NEEDLES else GRADED.get(task.partition("/")[2], 1)
                hardness, luck = random.random(units) ** 0.7 + 0.08 * random.random(), random.random(units)
                for mode in MODES:
                    for arm, strength in ARMS.items():
                        weight = strength * frailty * (1.6 if mode == "query_agnostic" else 1.0)
                        right = (luck < ability) & (hardness > weight * 0.55)
                        right ^= random.random(units) < 0.02 * (arm != FULL)
                        yield _answer(random, task, length, str(sample), mode, arm, right)


def _answer(
    random: np.random.Generator, task: str, length: int, sample: str, mode: str, arm: str, right: Any
) -> Record:
    index = int(sample)
    number = int(hashlib.sha256(f"{task} {length} {sample}".encode()).hexdigest()[:8], 16) % 10_000_000
    is_needles, budgeted = task == NEEDLES, "@" in arm
    values = {f"depth {depth}": float(hit) for depth, hit in zip(DEPTHS, right, strict=True)} if is_needles else {}
    share = float(random.uniform(0.24, 0.27)) if budgeted else 1.0
    cut = index == 3 and task == "ruler/qa_1"
    flags = ["truncated", "evidence_cut"] if cut else []
    flags += ["stopped_by_length"] if random.random() < 0.02 else []
    wrong = HOSTILE if index == 1 else f"are not given, but {number} was seen. " * int(random.integers(1, 9))
    alone = arm in (FULL, FULL_REPEAT)
    return record(
        task,
        sample,
        arm,
        float(np.mean(right)),
        length=length,
        mode=mode,
        cluster=f"article {index // 2}" if task.startswith("ruler/qa") else sample,
        prompt_sha=hashlib.sha256(f"{task} {length} {sample}".encode()).hexdigest(),
        n_prompt=length - 60,
        metric="needle_parallel" if is_needles else "ruler_part" if "/qa" in task else "ruler_all",
        prediction=str(number) if right.all() else wrong,
        answers=(str(number),),
        parts=values,
        kept_bytes=int(share * FULL_BYTES * length / 2048),
        full_bytes=FULL_BYTES * length // 2048,
        kept_share=share,
        n_new=int(random.integers(4, 60)),
        flags=tuple(flags),
        meta={"length": length},
        question=f"What is the special magic number for item {index} of {task}?",
        decode_rows=1 if alone else 9,
        n_cut=112 if cut else 0,
        evidence_left=0.0 if cut else 1.0,
        seconds=Seconds(
            prefill=float(random.normal(3.1, 0.1)),
            evidence=0.0 if alone else float(random.uniform(0.05, 1.4)),
            eviction=0.0 if alone else float(random.uniform(0.01, 0.06)),
            decode=float(random.uniform(0.6, 2.5)),
        ),
    )


MANIFEST: dict[str, Any] = {
    "format": 1,
    "run": RUN,
    "created": "2026-11-22T10:00:00+00:00",
    "sweep": {
        "name": "synthetic",
        "model": "synthetic-0.5b-instruct",
        "tasks": [{"task": "ruler", "length": 2048}, {"task": NEEDLES, "length": 2048}],
        "contracts": [arm.partition("@")[0] for arm in ARMS if "@" in arm],
        "budgets": ["25%"],
        "modes": list(MODES),
        "limit": 10,
        "seed": 42,
    },
    "margins": {"task": 0.03, "macro": 0.01},
    "arms": {arm: None if "@" not in arm else {"name": arm.partition("@")[0]} for arm in ARMS},
    "model": {"source": "synthetic-0.5b-instruct", "class": "Made", "parameters": 494_032_768, "dtype": "float32"},
    "tokenizer": "0123456789abcdef",
    "data": {"squad.json": "ab" * 32},
    "tasks": {f"{task}@2048": {"n": 10, "caveat": ""} for task in TASKS}
    | {f"{NEEDLES}@2048": {"n": 10, "caveat": "our own needles of the published grammar, not NeedleBench's"}},
    "software": [{"kvpress-engine": "0.1.0", "commit": "0123456789abcdef", "torch": "2.13.0", "device": "cpu"}],
}


def write_run(folder: Path, records: list[Record], manifest: dict[str, Any] | None = None) -> Path:
    """Write a run as the runner does: records and manifest."""
    file = RecordFile(folder / "records.jsonl")
    file.close()
    with (folder / "records.jsonl").open("ab") as out:  # without a sync for each of thousands of lines
        out.writelines(one.model_dump_json().encode() + b"\n" for one in records)
    (folder / "manifest.json").write_text(json.dumps(MANIFEST if manifest is None else manifest), encoding="utf-8")
    return folder


if __name__ == "__main__":
    write_run(Path(sys.argv[1]), synthetic_run())
