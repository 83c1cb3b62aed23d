"""Examiner: the engine of an evaluation that also measures the three stages of every arm and replays the failures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpress.cache import CompressedCache, can_join, join
from kvpress.contract import differences
from kvpress_eval.arms import Arm
from kvpress_eval.decode import Decoded, Stop
from kvpress_eval.diagnostic.boundary import (
    choose_units,
    exchange_at_random,
    exchange_measures,
    unit_measures,
    without_unit,
)
from kvpress_eval.diagnostic.case import Case, kept_sets, notes_of
from kvpress_eval.diagnostic.failure import Failure, Replayer
from kvpress_eval.diagnostic.finding import (
    ExchangeMeasures,
    Finding,
    MarginMeasures,
    Replay,
    UnitMeasures,
    Verdict,
    pack_counts,
)
from kvpress_eval.diagnostic.measure import KeptSets, access_measures, fit_measures, value_measures
from kvpress_eval.diagnostic.replay import Reading, read_reference, read_sets, rows_at_once
from kvpress_eval.diagnostic.witness import Notes, bear_witness
from kvpress_eval.engine import Answer, Engine, Read
from kvpress_eval.prompt import Prompt
from kvpress_eval.records import FULL
from kvpress_eval.sample import Sample
from kvpress_eval.scorers import find_scorer

if TYPE_CHECKING:
    from kvpress_eval.diagnostic.study import Measuring


#: verdict and replays of an arm, by its name
Verdicts = dict[str, tuple[Verdict, tuple[Replay, ...]]]


class Examiner(Engine):
    """An engine whose answers carry findings. measuring: what is measured, and which failures are replayed; host: the contract whose
    boundary is looked at."""

    def __init__(
        self, model: Any, tokenizer: Any, arms: Sequence[Arm], measuring: Measuring, host: str, **options: Any
    ) -> None:
        super().__init__(model, tokenizer, arms, **options)
        self.measuring, self.host = measuring, host

    def _cache(self, arm: Arm, reference: Tensor, draw: str) -> CompressedCache:
        cache = super()._cache(arm, reference, draw)
        cache.plan.observer = Notes()
        return cache

    def examine(
        self, reads: Sequence[Read], answers: list[Answer], prompt: Prompt, sample: Sample, tail: list[int]
    ) -> list[Answer]:
        case = self._case(reads, answers, prompt, sample, tail)
        readings = self._readings(case, reads)
        verdicts = self._verdicts(case, reads, readings)
        findings = {read.arm.name: self._finding(case, read, readings.get(read.arm.name), verdicts) for read in reads}
        if int(prompt.sha[-4:], 16) < self.measuring.boundary * 0x10000:
            for name, found in self._boundary(case, reads, readings):
                findings[name] = findings[name].model_copy(update=found)
        return [
            replace(one, measures=findings[read.arm.name].model_dump(mode="json"))
            for read, one in zip(reads, answers, strict=True)
        ]

    def _case(
        self, reads: Sequence[Read], answers: Sequence[Answer], prompt: Prompt, sample: Sample, tail: list[int]
    ) -> Case:
        """The sample with its witness: the full cache's own answer where it is right, else the sample's."""
        scorer = find_scorer(sample.metric)
        scores = {read.arm.name: scorer(one.text, sample).value for read, one in zip(reads, answers, strict=True)}
        read, answer = next(pair for pair in zip(reads, answers, strict=True) if pair[0].arm.name == FULL)
        solved = scores[FULL] >= self.measuring.failing.full
        ids = answer.ids if solved else self._right_answer(sample)
        seen = ids[: self.measuring.max_reference]
        witness = bear_witness(self.model, read.cache, notes_of(read), read.logits, tail, seen)
        reference = answer if solved else None
        whole = len(seen) == len(ids)
        return Case(sample, prompt, tail, read.cache, read.logits, witness, reference, whole, scores)

    def _right_answer(self, sample: Sample) -> tuple[int, ...]:
        return tuple(self.tokenizer(" " + sample.right_answer, add_special_tokens=False)["input_ids"])

    def _readings(self, case: Case, reads: Sequence[Read]) -> dict[str, Reading]:
        """The reference under the cache of every arm but those that go on evicting: no single cache is theirs."""
        found: dict[str, Reading] = {}
        joinable = [read for read in reads if can_join(read.arm.contract)]  # type: ignore[arg-type]
        rows = rows_at_once(case.full, self.measuring.rows)
        for start in range(0, len(joinable), rows):
            some = joinable[start : start + rows]
            cache, first = join([read.cache for read in some]), torch.cat([read.logits for read in some])
            try:
                readings = read_reference(self.model, cache, case.witness, first, case.tail)
            finally:
                cache.close()
            found |= dict(zip([read.arm.name for read in some], readings, strict=True))
        return found

    def _finding(self, case: Case, read: Read, reading: Reading | None, verdicts: Verdicts) -> Finding:
        """reading: None for an arm that goes on evicting."""
        witness, laws, facts = case.witness, notes_of(read).laws, case.facts
        margin = None
        if reading is not None:
            margin = MarginMeasures(
                reference="sample" if case.reference is None else "full",
                whole=case.whole,
                lowest=reading.lowest,
                log_probability=reading.log_probability,
                divergence=reading.divergence,
                first_wrong=reading.first_wrong,
            )
        heads = sum(layer.keys.shape[0] for layer in witness.layers.values())
        if read.arm.budget is None:
            return Finding(access=None, value=None, fit=None, margin=margin, kept=None, heads=heads, gold=facts)
        kept = kept_sets(read.cache, witness)
        verdict, replays = verdicts.get(read.arm.name, (None, ()))
        counts = sum(
            (mask.long().sum(0).cpu() for mask in kept.values()), torch.zeros(witness.n_prompt, dtype=torch.long)
        )
        return Finding(
            access=access_measures(witness, kept, laws, facts, case.sample.any_evidence),
            value=None if reading is None else value_measures(witness, kept),
            fit=fit_measures(laws),
            margin=margin,
            kept=pack_counts(counts.numpy()),
            heads=heads,
            gold=facts,
            verdict=verdict,
            replays=replays,
        )

    def _verdicts(self, case: Case, reads: Sequence[Read], readings: dict[str, Reading]) -> Verdicts:
        """Replay the failures: "none" where nothing failed, and nothing for arms that the study does not ask about or that go on evicting."""
        wanted, found, failures = self.measuring.attribute, Verdicts(), []
        for read in reads:
            contract, name = read.arm.contract, read.arm.name
            if read.arm.budget is None or contract is None or name not in readings:
                continue
            if wanted is not None and contract.name not in wanted:
                continue
            if case.reference is None or not self.measuring.failing.fails(case.scores[FULL], case.scores[name]):
                found[name] = "none", ()
            else:
                failures.append(Failure(read, readings[name], kept_sets(read.cache, case.witness)))
        newlines = self._newlines() if case.sample.stop_at_newline else frozenset[int]()
        scorer = find_scorer(case.sample.metric)

        def score(decoded: Decoded) -> float:
            return scorer(self._text(decoded), case.sample).value

        replayer = Replayer(self.model, self.measuring, case, lambda limit: Stop(self.eos, newlines, limit), score)
        replayed = replayer.attribute(failures)
        return found | {one.read.arm.name: what for one, what in zip(failures, replayed, strict=True)}

    def _boundary(
        self, case: Case, reads: Sequence[Read], readings: dict[str, Reading]
    ) -> Iterator[tuple[str, dict[str, ExchangeMeasures | UnitMeasures]]]:
        """Exchanges and units at the host's boundary, for every budget; by arm."""
        measuring, seed = self.measuring, case.seed

        def read_all(sets: list[KeptSets]) -> list[Reading]:
            return read_sets(self.model, case.full, case.witness, case.logits, case.tail, sets, measuring.rows)

        for host in reads:
            if host.arm.contract is None or host.arm.contract.name != self.host or host.arm.name not in readings:
                continue
            laws, kept = notes_of(host).laws, kept_sets(host.cache, case.witness)
            if not laws or any(
                int(law.valid.sum()) < law.valid.shape[0] * case.witness.n_prompt for law in laws.values()
            ):
                continue  # the boundary is one of single tokens
            rivals = [read for read in reads if _differs_in_ranking(host.arm, read.arm) and read.arm.name in readings]
            for rival in rivals:
                own = kept_sets(rival.cache, case.witness)
                moved = any(bool((kept[index] & ~own[index]).any()) for index in kept)
                drawn = [exchange_at_random(kept, own, laws, seed + i) for i in range(measuring.draws if moved else 0)]
                host_reading, reading = readings[host.arm.name], readings[rival.arm.name]
                found = exchange_measures(kept, own, laws, host_reading, reading, read_all(drawn))
                yield rival.arm.name, {"exchange": found}
            units = choose_units(kept, laws, measuring.width, measuring.units, seed)
            left_out = read_all([without_unit(case.witness, unit) for unit in units])
            by_ranking = {read.arm.contract.name: notes_of(read).laws for read in [host, *rivals] if read.arm.contract}
            yield host.arm.name, {"units": unit_measures(units, left_out, by_ranking, case.witness.n_prompt)}


def _differs_in_ranking(host: Arm, other: Arm) -> bool:
    assert host.contract is not None
    return other.contract is not None and differences(host.contract, other.contract) == ["ranking"]
