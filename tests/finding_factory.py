"""Synthetic diagnostic runs: records whose findings look like real ones.

python tests/finding_factory.py FOLDER   # writes a run of 8 tasks, 12 arms and three budgets for the eye
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record_factory import HOSTILE, MANIFEST, record, write_run

from kvpress_eval.diagnostic.finding import (
    AccessMeasures,
    ExchangeMeasures,
    Finding,
    FitMeasures,
    MarginMeasures,
    Replay,
    UnitMeasures,
    ValueMeasures,
    pack_counts,
)
from kvpress_eval.diagnostic.study import Study
from kvpress_eval.records import FULL, Record
from kvpress_eval.sweep import parse_sweep

#: as in configs/swaps/small.yaml, without the arms that a test does not need
SWAPS: dict[str, Any] = {
    "cumulative": {"swap": {"query_law": "all"}},
    "debiased": {"base": "cumulative", "swap": {"access": {"kind": "aggregate", "pooling": "avg", "kernel": 7, "debias": True}}},
    "proximal": {"base": "debiased", "swap": {"query_law": {"kind": "tail", "window": 32}}},
    "unpooled": {"swap": {"access": "aggregate"}},
    "vatp": {"swap": {"ranking": "vatp"}},
    "nolev": {"swap": {"ranking": "nolev"}},
    "mii": {"swap": {"ranking": "mii"}},
    "adakv": {"swap": {"allocation": {"kind": "ada", "floor": 0.2}}},
    "blocks": {"transfer": "fit", "swap": {"granularity": {"kind": "block", "size": 16}, "retention": "strict_blocks"}},
    "filled": {"base": "blocks", "swap": {"retention": "blocks_token_fill"}},
}  # fmt: skip
#: what an arm does to an answer at the smallest budget: strength by stage
HARM: dict[str, tuple[float, float, float]] = {
    "cumulative": (1.0, 0.1, 0.1),
    "debiased": (0.75, 0.1, 0.1),
    "proximal": (0.5, 0.12, 0.12),
    "snapkv": (0.42, 0.12, 0.12),
    "null": (0.42, 0.12, 0.12),
    "unpooled": (0.5, 0.12, 0.12),
    "vatp": (0.42, 0.1, 0.12),
    "nolev": (0.42, 0.05, 0.12),
    "mii": (0.42, 0.06, 0.12),
    "adakv": (0.4, 0.12, 0.08),
    "blocks": (0.42, 0.12, 0.35),
    "filled": (0.42, 0.12, 0.3),
    "oracle": (0.05, 0.1, 0.1),
}
#: task: (rate at which the full cache solves it, how much harder eviction hits it, its coupling)
TASKS: dict[str, tuple[float, float, float]] = {
    "ruler/niah_single_3": (0.97, 0.8, 0.02),
    "ruler/niah_multikey_2": (0.9, 1.3, 0.31),
    "ruler/niah_multikey_3": (0.75, 1.6, 0.44),
    "ruler/niah_multivalue": (0.9, 1.0, 0.03),
    "ruler/vt": (0.7, 0.8, 0.05),
    "ruler/qa_1": (0.75, 0.5, 0.08),
    "ruler/cwe": (0.6, 0.6, 0.12),
    "ruler/fwe": (0.8, 0.2, 0.01),
}
RELIEF = {"5%": 1.0, "10%": 0.7, "25%": 0.35}
STAGES = ("access", "value", "fit")
N_LAYERS, N_TOKENS, N_HEADS = 6, 240, 12


def sweep(**changes: Any) -> dict[str, Any]:
    """The fields of a study."""
    fields: dict[str, Any] = {
        "name": "synthetic",
        "model": "synthetic-0.5b-instruct",
        "tasks": [{"task": task, "length": 2048} for task in TASKS],
        "budgets": list(RELIEF),
        "host": "snapkv",
        "swaps": SWAPS,
        "limit": 12,
    }
    return {**fields, **changes}


def manifest(*, model: str = "synthetic-0.5b-instruct", coupling: bool = True, **changes: Any) -> dict[str, Any]:
    """The manifest of a diagnostic run. changes: of the study."""
    found = {**MANIFEST, "sweep": sweep(**changes), "model": {**MANIFEST["model"], "source": model}, "tasks": {}}
    return found | ({"coupling": {task: facts[2] for task, facts in TASKS.items()}} if coupling else {})


def finding(**changes: Any) -> Finding:
    """One finding; whatever is not given is plausible."""
    values: dict[str, Any] = {
        "access": access(),
        "value": ValueMeasures(predicted=0.2, measured=0.3, agreement=0.6, by_layer=(0.1, 0.3), by_step=(0.3,)),
        "fit": FitMeasures(eps_lat=0, ties=2, kept_mass=0.7),
        "margin": MarginMeasures(
            reference="full", whole=True, lowest=1.0, log_probability=-0.1, divergence=0.05, first_wrong=None
        ),
        "kept": None,
        "heads": N_HEADS,
        "verdict": "none",
    }
    return Finding(**{**values, **changes})


def access(**changes: Any) -> AccessMeasures:
    """Stage I of one finding, with Prop. 3 on the right side."""
    values = {"tv_decode": 0.4, "kept_decode": 0.6, "tv_first": 0.5, "tv_phase": 0.4, "tv_fit": 0.3}
    return AccessMeasures(**{**values, **changes})


def replays(repaired_by: str | None, chance: bool = False) -> tuple[Replay, ...]:
    """The replays of a failure; repaired_by: the first that brings the answer back."""
    names = (
        "stored",
        "evidence",
        "ranking",
        "set",
        "facts",
        *(("chance",) if repaired_by not in (None, "stored") else ()),
    )
    names = names if repaired_by == "stored" else names[1:]
    found, is_back = [], False
    for name in names:
        is_back = is_back or name == repaired_by
        good = chance if name == "chance" else is_back
        found.append(
            Replay(name=name, lowest=0.8 if good else -2.5, score=None if good else 0.0, repaired=good, exchanged=0.4)
        )
    return tuple(found)


def measured(one: Record, found: Finding) -> Record:
    """The record with a finding."""
    return one.model_copy(update={"measures": found.model_dump(mode="json")})


def synthetic_run(
    *,
    n_samples: int = 12,
    seed: int = 1,
    tasks: Sequence[str] = tuple(TASKS),
    budgets: Sequence[str] = tuple(RELIEF),
    modes: Sequence[str] = ("query_aware",),
    arms: Sequence[str] = tuple(HARM),
    attribute: Sequence[str] | None = None,
    strength: float = 1.0,
) -> list[Record]:
    """A run in the manner of RULER. attribute: arms whose failures are replayed. strength: of everything that arms do."""
    random = np.random.default_rng(seed)
    found = _records(random, n_samples, tasks, budgets, modes, attribute, strength)
    return [one for one in found if one.arm == FULL or one.contract in arms]


def _records(
    random: np.random.Generator,
    n_samples: int,
    tasks: Sequence[str],
    budgets: Sequence[str],
    modes: Sequence[str],
    attribute: Sequence[str] | None,
    strength: float,
) -> Iterator[Record]:
    for task in tasks:
        ability, frailty, _ = TASKS[task]
        for sample in range(n_samples):
            solved, hardness = random.random() < ability, random.random(3) ** 0.8
            for mode in modes:
                name = {"mode": mode, "cluster": f"page {sample // 2}" if "qa" in task else str(sample)}
                full = record(
                    task,
                    str(sample),
                    FULL,
                    float(solved),
                    prediction=_number(task, sample) if solved else "no idea",
                    **name,
                )
                margin = MarginMeasures(
                    reference="full" if solved else "sample",
                    whole=True,
                    lowest=2.0,
                    log_probability=-0.05,
                    divergence=0.0,
                    first_wrong=None,
                )
                yield measured(full, finding(access=None, value=None, fit=None, margin=margin, verdict=None))
                for budget in budgets:
                    for arm, harm in HARM.items():
                        weight = strength * frailty * RELIEF[budget] * (1.4 if mode == "query_agnostic" else 1.0)
                        lost = (hardness < np.array(harm) * weight) ^ (random.random(3) < 0.015 * (arm != "null"))
                        yield _answer(random, task, sample, f"{arm}@{budget}", solved, lost, attribute, **name)


def _answer(
    random: np.random.Generator,
    task: str,
    sample: int,
    arm: str,
    solved: bool,
    lost: Any,
    attribute: Sequence[str] | None,
    **name: Any,
) -> Record:
    contract, _, budget = arm.partition("@")
    harm, relief = HARM[contract], RELIEF[budget]
    right = solved and not lost.any()
    number = _number(task, sample)
    verdict: Any = "none"
    tried: tuple[Replay, ...] = ()
    if solved and not right:
        verdict = STAGES[int(lost.argmax())] if random.random() > 0.12 else "undecided"
        by_chance = verdict == "undecided" and random.random() < 0.5
        names = {"access": "evidence", "value": "ranking", "fit": "set", "undecided": "evidence" if by_chance else None}
        tried = replays(names[verdict], by_chance)
    if attribute is not None and contract not in attribute:
        verdict, tried = None, ()
    kept = float(np.clip(0.92 - 0.45 * harm[0] * relief + 0.04 * random.normal(), 0.02, 0.99))
    phase, fit = (
        float(random.uniform(0.25, 0.4)),
        float(np.clip(0.15 + 0.5 * harm[2] * relief + 0.03 * random.normal(), 0.01, 0.9)),
    )
    change = float(np.clip(0.12 + 0.6 * (1 - kept) + 0.02 * random.normal(), 0.01, 2))
    gold = float(np.clip(kept + 0.05 * random.normal(), 0, 1))
    needles = task.endswith(("multivalue", "multikey_2", "vt"))
    asked = sample % 2 == 0
    found = finding(
        access=access(
            tv_decode=1 - kept, kept_decode=kept, tv_first=0.85 * (phase + fit), tv_phase=phase, tv_fit=fit,
            gold_tokens=gold, gold_whole=gold**2, gold_broken=0.3 * (1 - gold), group_broken=0.5 * (1 - gold) if needles else None,
        ) if "qa" not in task else access(tv_decode=1 - kept, kept_decode=kept, tv_first=0.85 * (phase + fit), tv_phase=phase, tv_fit=fit),
        value=ValueMeasures(
            predicted=0.7 * change, measured=change, agreement=float(np.clip(0.6 + 0.1 * random.normal(), -1, 1)),
            by_layer=tuple(round(float(change * (0.5 + 0.2 * layer) + 0.01 * random.normal() ** 2), 5) for layer in range(N_LAYERS)),
            by_step=(change, change),
        ),
        fit=FitMeasures(eps_lat=9 if contract == "blocks" else 0, ties=int(random.integers(0, 4)), kept_mass=kept),
        margin=MarginMeasures(
            reference="full" if solved else "sample", whole=True, lowest=float(random.normal(2.0 if right else -2.0)),
            log_probability=-float(random.exponential(0.2)), divergence=float(random.exponential(0.4 * (1 - kept))), first_wrong=None if right else 1,
        ),
        kept=pack_counts(random.integers(0, N_HEADS + 1, N_TOKENS)),
        gold=((20, 30),) if "qa" not in task else (),
        verdict=verdict,
        replays=tried,
        exchange=_exchange(random, contract) if asked and contract in ("vatp", "nolev", "mii", "null") else None,
        units=_units(random) if asked and contract == "snapkv" else None,
    )  # fmt: skip
    wrong = HOSTILE if sample == 1 else f"I do not see it, but {number} is mentioned."
    return measured(
        record(
            task,
            str(sample),
            arm,
            float(right),
            prediction=number if right else wrong,
            answers=(number,),
            question=f"What is the special magic number for item {sample} of {task}?",
            contract_id=hashlib.sha256(arm.encode()).hexdigest(),
            **name,
        ),
        found,
    )


def _number(task: str, sample: int) -> str:
    return str(int(hashlib.sha256(f"{task} {sample}".encode()).hexdigest()[:8], 16) % 10_000_000)


def _exchange(random: np.random.Generator, contract: str) -> ExchangeMeasures:
    if contract == "null":
        return ExchangeMeasures(exchanged=0.0, near=None, gain=0.0, chance=None)
    return ExchangeMeasures(
        exchanged=float(random.uniform(0.1, 0.2)),
        near=float(random.uniform(0.3, 0.6)),
        gain=float(random.normal(0.03, 0.05)),
        chance=float(random.normal(-0.15, 0.08)),
    )


def _units(random: np.random.Generator) -> UnitMeasures:
    skill = {"snapkv": 0.08, "vatp": 0.1, "nolev": 0.14, "mii": 0.16, "null": 0.08}
    return UnitMeasures(
        n=16,
        divergence=float(random.exponential(0.05)),
        spearman={name: float(np.clip(random.normal(mean, 0.2), -1, 1)) for name, mean in skill.items()},
        auc={name: float(np.clip(random.normal(0.5 + mean / 2, 0.1), 0, 1)) for name, mean in skill.items()},
    )


def study(**changes: Any) -> Study:
    """The study of the synthetic run."""
    found = parse_sweep(sweep(**changes), "the synthetic study")
    assert isinstance(found, Study)
    return found


if __name__ == "__main__":
    write_run(Path(sys.argv[1]), synthetic_run(), manifest())
