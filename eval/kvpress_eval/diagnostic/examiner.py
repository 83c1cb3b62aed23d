"""Examiner: the engine of an evaluation that also measures the three stages of every arm and replays the failures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpress.cache import CompressedCache, can_join, join
from kvpress.contract import differences
from kvpress_eval.arms import Arm
from kvpress_eval.decode import Stop
from kvpress_eval.diagnostic.attribution import counterfactuals, verdict_of
from kvpress_eval.diagnostic.boundary import (
    choose_units,
    exchange_at_random,
    exchange_measures,
    unit_measures,
    without_unit,
)
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
from kvpress_eval.diagnostic.replay import Reading, answer_sets, read_reference, read_sets
from kvpress_eval.diagnostic.witness import Notes, Witness, bear_witness
from kvpress_eval.engine import Answer, Engine, Read
from kvpress_eval.prompt import Prompt
from kvpress_eval.records import FULL
from kvpress_eval.sample import Sample
from kvpress_eval.scorers import find_scorer

if TYPE_CHECKING:
    from kvpress_eval.diagnostic.study import Measuring


@dataclass(frozen=True)
class _Case:
    """One sample: what all of its arms share. logits: [1, vocabulary] behind what the full cache has read."""

    sample: Sample
    prompt: Prompt
    tail: list[int]
    full: CompressedCache
    logits: Tensor
    witness: Witness
    reference: Answer | None
    scores: dict[str, float]

    @property
    def facts(self) -> list[tuple[int, int]]:
        """Facts inside the part that is cut."""
        return [fact for fact in self.prompt.facts if fact[1] <= self.witness.n_prompt]


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
        by_arm = {read.arm.name: (read, answer) for read, answer in zip(reads, answers, strict=True)}
        read, answer = by_arm[FULL]
        scorer = find_scorer(sample.metric)
        scores = {name: scorer(one.text, sample).value for name, (_, one) in by_arm.items()}
        solved = scores[FULL] >= self.measuring.failing.full and answer.ids
        ids = answer.ids if solved else self._right_answer(sample)
        witness = bear_witness(self.model, read.cache, _notes(read), tail, ids[: self.measuring.max_reference])
        case = _Case(sample, prompt, tail, read.cache, read.logits, witness, answer if solved else None, scores)
        readings = self._readings(case, reads)
        findings = {read.arm.name: self._finding(case, read, readings[read.arm.name]) for read in reads}
        if int(prompt.sha[-4:], 16) < self.measuring.boundary * 0x10000:
            for name, found in self._boundary(case, reads, readings):
                findings[name] = findings[name].model_copy(update=found)
        return [
            replace(one, measures=findings[read.arm.name].model_dump(mode="json"))
            for read, one in zip(reads, answers, strict=True)
        ]

    def _right_answer(self, sample: Sample) -> tuple[int, ...]:
        return tuple(self.tokenizer(" " + sample.right_answer, add_special_tokens=False)["input_ids"])

    def _readings(self, case: _Case, reads: Sequence[Read]) -> dict[str, Reading]:
        """The reference under every arm: over its own cache, or, where eviction has gone on in the answer, over what it kept."""
        found: dict[str, Reading] = {}
        joinable = [read for read in reads if can_join(read.arm.contract)]  # type: ignore[arg-type]
        for start in range(0, len(joinable), self.measuring.rows):
            some = joinable[start : start + self.measuring.rows]
            cache = join([read.cache for read in some])
            try:
                readings = read_reference(self.model, cache, case.witness, case.tail)
            finally:
                cache.close()
            found |= dict(zip([read.arm.name for read in some], readings, strict=True))
        others = [read for read in reads if read not in joinable]
        sets = [kept_sets(read.cache, case.witness) for read in others]
        readings = read_sets(self.model, case.full, case.witness, case.tail, sets, self.measuring.rows)
        return found | dict(zip([read.arm.name for read in others], readings, strict=True))

    def _finding(self, case: _Case, read: Read, reading: Reading) -> Finding:
        witness, laws = case.witness, _notes(read).laws
        margin = MarginMeasures(
            reference="sample" if case.reference is None else "full",
            lowest=reading.lowest,
            log_probability=reading.log_probability,
            divergence=reading.divergence,
            first_wrong=reading.first_wrong,
        )
        heads = sum(layer.keys.shape[0] for layer in witness.layers.values())
        facts = tuple(case.facts)
        if read.arm.budget is None:
            return Finding(access=None, value=None, fit=None, margin=margin, kept=None, heads=heads, gold=facts)
        kept = kept_sets(read.cache, witness)
        verdict, replays = self._attribute(case, read, kept)
        counts = sum(mask.long().sum(0).cpu() for mask in kept.values())
        assert isinstance(counts, Tensor)
        return Finding(
            access=access_measures(witness, kept, laws, facts),
            value=value_measures(witness, kept),
            fit=fit_measures(laws),
            margin=margin,
            kept=pack_counts(counts.numpy()),
            heads=heads,
            gold=facts,
            verdict=verdict,
            replays=replays,
        )

    def _boundary(
        self, case: _Case, reads: Sequence[Read], readings: dict[str, Reading]
    ) -> Iterator[tuple[str, dict[str, ExchangeMeasures | UnitMeasures]]]:
        """Exchanges and units at the host's boundary, for every budget; by arm."""
        measuring, seed = self.measuring, int(case.prompt.sha[:8], 16)

        def read_all(sets: list[KeptSets]) -> list[Reading]:
            return read_sets(self.model, case.full, case.witness, case.tail, sets, measuring.rows)

        for host in reads:
            if host.arm.contract is None or host.arm.contract.name != self.host:
                continue
            laws, kept = _notes(host).laws, kept_sets(host.cache, case.witness)
            if any(int(law.valid.sum()) < law.valid.shape[0] * case.witness.n_prompt for law in laws.values()):
                continue  # the boundary is one of single tokens
            rivals = [read for read in reads if _differs_in_ranking(host.arm, read.arm)]
            for rival in rivals:
                own = kept_sets(rival.cache, case.witness)
                moved = any(bool((kept[index] & ~own[index]).any()) for index in kept)
                drawn = [exchange_at_random(kept, own, laws, seed + i) for i in range(measuring.draws if moved else 0)]
                host_reading, reading = readings[host.arm.name], readings[rival.arm.name]
                found = exchange_measures(kept, own, laws, host_reading, reading, read_all(drawn))
                yield rival.arm.name, {"exchange": found}
            units = choose_units(kept, laws, measuring.width, measuring.units, seed)
            left_out = read_all([without_unit(case.witness, unit) for unit in units])
            by_ranking = {read.arm.contract.name: _notes(read).laws for read in [host, *rivals] if read.arm.contract}
            yield host.arm.name, {"units": unit_measures(units, left_out, by_ranking, case.witness.n_prompt)}

    def _attribute(self, case: _Case, read: Read, kept: KeptSets) -> tuple[Verdict | None, tuple[Replay, ...]]:
        """Replay a failure; "none" where nothing failed, None where the study does not ask."""
        contract, wanted = read.arm.contract, self.measuring.attribute
        assert contract is not None
        if wanted is not None and contract.name not in wanted:
            return None, ()
        full, arm = case.scores[FULL], case.scores[read.arm.name]
        if case.reference is None or not self.measuring.failing.fails(full, arm):
            return "none", ()
        laws = _notes(read).laws
        if not laws:  # an answer that ended before its cache was due to be cut
            return None, ()
        budgets = {index: law.budget for index, law in laws.items()}
        found = counterfactuals(contract, case.witness, kept, budgets, case.facts, int(case.prompt.sha[:8], 16))
        sets = dict(found.sets)
        if _holds_exact_values(read.cache, case.witness):
            del sets["stored"]  # it is the arm itself, which failed
        names = list(sets)
        readings = dict(zip(names, read_sets(
            self.model, case.full, case.witness, case.tail, list(sets.values()), self.measuring.rows
        ), strict=True))  # fmt: skip
        scores = self._texts(case, {name: sets[name] for name in self._unclear(readings)})
        replays = tuple(
            Replay(
                name=name,  # type: ignore[arg-type]
                lowest=readings[name].lowest,
                score=scores.get(name),
                repaired=readings[name].says_reference or self._repairs(full, scores.get(name)),
                exchanged=found.exchanged[name],
            )
            for name in names
        )
        return verdict_of(replays), replays

    def _unclear(self, readings: dict[str, Reading]) -> list[str]:
        """Replays whose text must be looked at: the margin does not show the reference, and they could still change the verdict."""
        shown = [name for name, reading in readings.items() if reading.says_reference and name != "chance"]
        before = list(readings) if not shown else list(readings)[: list(readings).index(shown[0])]
        return [name for name in readings if (name in before or name == "chance") and not readings[name].says_reference]

    def _repairs(self, full: float, score: float | None) -> bool:
        return score is not None and not self.measuring.failing.fails(full, score)

    def _texts(self, case: _Case, sets: dict[str, KeptSets]) -> dict[str, float]:
        """Scores of the replays' own answers, which may be a little longer than the reference."""
        newlines = self._newlines() if case.sample.stop_at_newline else frozenset[int]()
        assert case.reference is not None
        limit = min(len(case.reference.ids) + self.measuring.answer_slack, case.sample.max_new_tokens)
        decoded = answer_sets(
            self.model, case.full, case.logits, case.tail, list(sets.values()), self.measuring.rows,
            Stop(self.eos, newlines, limit),
        )  # fmt: skip
        scorer = find_scorer(case.sample.metric)
        return {name: scorer(self._text(one), case.sample).value for name, one in zip(sets, decoded, strict=True)}


def _notes(read: Read) -> Notes:
    notes = read.cache.plan.observer
    assert isinstance(notes, Notes)
    return notes


def _differs_in_ranking(host: Arm, other: Arm) -> bool:
    assert host.contract is not None
    return other.contract is not None and differences(host.contract, other.contract) == ["ranking"]


def kept_sets(cache: CompressedCache, witness: Witness) -> KeptSets:
    """Which tokens of the prompt each head of a cache holds now."""
    found = {}
    for layer in cache.compressed_layers:
        groups = layer.storage.groups(0, witness.n_prompt)
        masks = []
        for group in groups:
            mask = torch.zeros(witness.n_prompt, dtype=torch.bool, device=group.keys.device)
            mask[group.positions] = True
            masks += [mask] * group.keys.shape[0]
        found[layer.index] = torch.stack(masks)
    return found


def _holds_exact_values(cache: CompressedCache, witness: Witness) -> bool:
    """Whether what a cache stores of the prompt is what the full cache holds."""
    for layer in cache.compressed_layers:
        exact, head = witness.layers[layer.index], 0
        for group in layer.storage.groups(0, witness.n_prompt):
            for keys, values in zip(group.keys, group.values, strict=True):
                at = group.positions
                if not torch.equal(keys, exact.keys[head, at]) or not torch.equal(values, exact.values[head, at]):
                    return False
                head += 1
    return True
