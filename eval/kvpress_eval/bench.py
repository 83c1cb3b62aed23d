"""What an evaluation costs beside the bare work: `kvpress eval bench`.

Bare work of one contract is one prefill and one decode of plain transformers with its own cache, as many tokens as the
evaluation generated. The evaluation reads a prompt once for all contracts and decodes them in one batch, and pays for
evidence, eviction, scoring and records. Both take turns, sample by sample, in one process.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from kvpress_eval.engine import Engine
from kvpress_eval.records import FULL, Record, RecordFile
from kvpress_eval.runner import Runner
from kvpress_eval.units import Item, Unit, make_units


@dataclass(frozen=True)
class Cost:
    """Seconds of one sample: the bare prefill, the bare decode of every arm's answer, and the evaluation of all arms."""

    sample: str
    prefill: float
    decodes: tuple[float, ...]
    alone: float
    evaluation: float


def measure(runner: Runner) -> dict[str, Any]:
    """Run the sweep's first mode without keeping its records; figures as a JSON-able mapping.

    per_extra_contract: seconds that a contract adds to the full cache, over the bare prefill and decode that it would take
    by itself. all_contracts: the evaluation of all arms over the bare work of all, each with a prefill of its own.
    """
    costs: list[Cost] = []
    engine, full = runner.engine(), runner.engine([arm for arm in runner.arms if arm.name == FULL])
    with tempfile.TemporaryDirectory() as folder, RecordFile(Path(folder) / "records.jsonl") as file:
        for task, length, items in runner.read_tasks():
            units = make_units(task, length, runner.sweep.modes[0], items, engine.shares_contexts)
            if not costs:  # the first passes of a process are slow
                _bare(runner, units[0].items[0])
            for unit in units:
                costs.append(_cost(runner, engine, full, unit, file, turn=len(costs)))
    n_extra = len(runner.arms) - 1
    bare = [cost.prefill + decode for cost in costs for decode in cost.decodes[1:]]
    added = sum(cost.evaluation - cost.alone for cost in costs)
    return {
        "samples": len(costs),
        "contracts": n_extra,
        "bare_prefill_seconds": _mean([cost.prefill for cost in costs]),
        "bare_decode_seconds": _mean([decode for cost in costs for decode in cost.decodes]),
        "full_cache_alone_seconds": _mean([cost.alone for cost in costs]),
        "evaluation_seconds": _mean([cost.evaluation for cost in costs]),
        "per_extra_contract": added / sum(bare) if bare else None,
        "all_contracts": sum(c.evaluation for c in costs) / sum(c.prefill + d for c in costs for d in c.decodes),
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _cost(runner: Runner, engine: Engine, full: Engine, unit: Unit, file: RecordFile, turn: int) -> Cost:
    """Costs of a unit; the three measurements begin with another one each time."""
    item, records = unit.items[0], list[Record]()
    seconds: dict[str, float] = {}
    bare = (0.0, 0.0)
    for what in ("alone", "evaluation", "bare")[turn % 3 :] + ("alone", "evaluation", "bare")[: turn % 3]:
        start = time.perf_counter()
        if what == "bare":
            bare = _bare(runner, item)
        else:
            made = runner.missing(full if what == "alone" else engine, unit, (), {})
            file.append(made)
            records = made if what == "evaluation" else records
        seconds[what] = time.perf_counter() - start
    (prefill, step), alone, evaluation = bare, seconds["alone"], seconds["evaluation"]
    return Cost(
        item.sample.id, prefill, tuple(step * (r.n_new - 1) for r in _by_arm(runner, records)), alone, evaluation
    )


def _by_arm(runner: Runner, records: list[Record]) -> list[Record]:
    order = [arm.name for arm in runner.arms]
    return sorted(records, key=lambda record: order.index(record.arm))


@torch.inference_mode()
def _bare(runner: Runner, item: Item, n_steps: int = 8) -> tuple[float, float]:
    """Seconds of plain transformers' prefill, and of one of its decode steps (mean of n_steps)."""
    ids = torch.tensor([item.prompt.ids], device=runner.model.device)
    cache = DynamicCache(config=runner.model.config)
    start = time.perf_counter()
    token = runner.model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    token.tolist()
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(n_steps):
        token = runner.model(input_ids=token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        token.tolist()
    return prefill, (time.perf_counter() - start) / n_steps
