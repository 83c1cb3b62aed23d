"""The replays of a sample's failures, run: their readings, their texts where the readings leave it open, and the control by chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from kvpress.evidence import LayerSpec
from kvpress_eval.decode import Decoded, Stop
from kvpress_eval.diagnostic.attribution import Counterfactuals, counterfactuals, first_repair, verdict_of
from kvpress_eval.diagnostic.boundary import exchange_at_random
from kvpress_eval.diagnostic.case import Case, holds_exact_values, notes_of
from kvpress_eval.diagnostic.finding import Replay, Verdict
from kvpress_eval.diagnostic.measure import KeptSets
from kvpress_eval.diagnostic.replay import Reading, answer_sets, read_sets
from kvpress_eval.diagnostic.study import Measuring
from kvpress_eval.engine import Read
from kvpress_eval.records import FULL


@dataclass(frozen=True)
class Failure:
    """An arm that lost the answer. own: the reference under the arm itself; kept: its set."""

    read: Read
    own: Reading
    kept: KeptSets


#: reading of a set, whether the answer is back (None: left open), and its text's score where one was asked for
_Outcome = tuple[Reading, bool | None, float | None]


@dataclass(frozen=True)
class Replayer:
    """Runs replays of one case, those of all its failures in common batches: a step reads the model's weights once for all rows.

    stop: when a text ends, given its limit in tokens; score: of a decoded text.
    """

    model: PreTrainedModel
    measuring: Measuring
    case: Case
    stop: Callable[[int], Stop]
    score: Callable[[Decoded], float]

    def attribute(self, failures: Sequence[Failure]) -> list[tuple[Verdict, tuple[Replay, ...]]]:
        """Verdict and replays of each failure."""
        made = [self._counterfactuals(one) for one in failures]
        tried = self._try([list(one.sets.values()) for one in made], failures, in_order=True)
        replays = [
            [_replay(name, outcome, one.exchanged[name]) for name, outcome in zip(one.sets, outcomes, strict=True)]
            for one, outcomes in zip(made, tried, strict=True)
        ]
        repairs = [first_repair(found) for found in replays]
        drawn = [
            self._drawn(failure, one.sets[repair.name]) if repair is not None and repair.name != "stored" else []
            for failure, one, repair in zip(failures, made, repairs, strict=True)
        ]
        by_chance = self._try(drawn, failures, in_order=False)
        for found, repair, outcomes in zip(replays, repairs, by_chance, strict=True):
            if repair is not None:
                found += [_replay("chance", outcome, repair.exchanged) for outcome in outcomes]
        return [(verdict_of(found), tuple(found)) for found in replays]

    def _counterfactuals(self, failure: Failure) -> Counterfactuals:
        read, case = failure.read, self.case
        contract, laws = read.arm.contract, notes_of(read).laws
        assert contract is not None
        specs = {layer.index: _spec(layer.spec) for layer in read.cache.compressed_layers}
        budgets = {index: law.budget for index, law in laws.items()}
        facts = case.facts[: self._n_facts]
        found = counterfactuals(contract, case.witness, specs, failure.kept, budgets, facts)
        sets = dict(found.sets)
        if holds_exact_values(read.cache, case.witness):
            del sets["stored"]  # it is the arm itself, which failed
        return Counterfactuals(sets, found.exchanged)

    @property
    def _n_facts(self) -> int | None:
        """Where any one fact is enough, the first one is forced into the set; else all are."""
        return 1 if self.case.sample.any_evidence else None

    def _drawn(self, failure: Failure, repair: KeptSets) -> list[KeptSets]:
        """As many tokens as a repair exchanges, exchanged at random."""
        laws, seed = notes_of(failure.read).laws, self.case.seed
        return [exchange_at_random(failure.kept, repair, laws, seed + i) for i in range(self.measuring.controls)]

    def _try(
        self, sets: Sequence[Sequence[KeptSets]], failures: Sequence[Failure], in_order: bool
    ) -> list[list[_Outcome]]:
        """What becomes of each failure's sets. in_order: what stands behind a failure's first repair is left open."""
        case, rows = self.case, self.measuring.rows
        flat = [one for some in sets for one in some]
        everything = iter(read_sets(self.model, case.full, case.witness, case.logits, case.tail, flat, rows))
        readings = [[next(everything) for _ in some] for some in sets]
        # a margin says "the answer is back" only if the reference is all there, and the failing arm does not say it too
        shown = [
            [case.whole and not failure.own.says_reference and reading.says_reference for reading in some]
            for failure, some in zip(failures, readings, strict=True)
        ]
        last = [some.index(True) if in_order and True in some else len(some) for some in shown]
        asked = [(i, j) for i, some in enumerate(shown) for j in range(last[i]) if not some[j]]
        scores = dict(zip(asked, self._scores([sets[i][j] for i, j in asked]), strict=True))
        repaired = {at: self._repairs(value) for at, value in scores.items()}
        return [
            [
                (reading, True if shown[i][j] else repaired.get((i, j)), scores.get((i, j)))
                for j, reading in enumerate(some)
            ]
            for i, some in enumerate(readings)
        ]

    def _scores(self, sets: Sequence[KeptSets]) -> list[float]:
        """Scores of the sets' own answers, which may be a little longer than the reference."""
        case = self.case
        if not sets:  # also where the full cache failed, so that there is no reference and nothing to replay
            return []
        assert case.reference is not None
        limit = min(len(case.reference.ids) + self.measuring.answer_slack, case.sample.max_new_tokens)
        texts = answer_sets(self.model, case.full, case.logits, case.tail, sets, self.measuring.rows, self.stop(limit))
        return [self.score(text) for text in texts]

    def _repairs(self, score: float) -> bool:
        return not self.measuring.failing.fails(self.case.scores[FULL], score)


def _spec(spec: LayerSpec | None) -> LayerSpec:
    assert spec is not None, "a layer that has read a prompt knows its attention"
    return spec


def _replay(name: str, outcome: _Outcome, exchanged: float) -> Replay:
    reading, repaired, score = outcome
    return Replay(name=name, lowest=reading.lowest, score=score, repaired=repaired, exchanged=exchanged)  # type: ignore[arg-type]
