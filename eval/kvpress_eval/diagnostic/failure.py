"""The replays of one failure, run: their readings, their texts where the readings leave it open, and the control by chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from kvpress.evidence import LayerSpec
from kvpress_eval.decode import Decoded, Stop
from kvpress_eval.diagnostic.attribution import counterfactuals, first_repair, verdict_of
from kvpress_eval.diagnostic.boundary import exchange_at_random
from kvpress_eval.diagnostic.case import Case, holds_exact_values, notes_of
from kvpress_eval.diagnostic.finding import Replay, Verdict
from kvpress_eval.diagnostic.measure import KeptSets
from kvpress_eval.diagnostic.replay import Reading, answer_sets, read_sets
from kvpress_eval.diagnostic.study import Measuring
from kvpress_eval.engine import Read
from kvpress_eval.records import FULL


@dataclass(frozen=True)
class Replayer:
    """Runs replays of one case. stop: when a text ends, given its limit in tokens; score: of a decoded text."""

    model: PreTrainedModel
    measuring: Measuring
    case: Case
    stop: Callable[[int], Stop]
    score: Callable[[Decoded], float]

    def attribute(self, read: Read, own: Reading, kept: KeptSets) -> tuple[Verdict, tuple[Replay, ...]]:
        """Verdict and replays of a failing arm. own: the reference under the arm itself; kept: its set."""
        contract, laws = read.arm.contract, notes_of(read).laws
        assert contract is not None
        specs = {layer.index: _spec(layer.spec) for layer in read.cache.compressed_layers}
        budgets = {index: law.budget for index, law in laws.items()}
        found = counterfactuals(contract, self.case.witness, specs, kept, budgets, self.case.facts[: self._n_facts])
        sets = dict(found.sets)
        if holds_exact_values(read.cache, self.case.witness):
            del sets["stored"]  # it is the arm itself, which failed
        # a margin says "the answer is back" only if the reference is all there, and the failing arm does not say it too
        decisive = self.case.whole and not own.says_reference
        tried = self._try(list(sets.items()), decisive, in_order=True)
        replays = [
            _replay(name, reading, repaired, score, found.exchanged[name])
            for name, (reading, repaired, score) in zip(sets, tried, strict=True)
        ]
        repair = first_repair(replays)
        if repair is not None and repair.name != "stored":
            drawn = [
                ("chance", exchange_at_random(kept, sets[repair.name], laws, self.case.seed + i))
                for i in range(self.measuring.controls)
            ]
            replays += [
                _replay("chance", reading, repaired, score, repair.exchanged)
                for reading, repaired, score in self._try(drawn, decisive, in_order=False)
            ]
        return verdict_of(replays), tuple(replays)

    @property
    def _n_facts(self) -> int | None:
        """Where any one fact is enough, the first one is forced into the set; else all are."""
        return 1 if self.case.sample.any_evidence else None

    def _try(
        self, sets: Sequence[tuple[str, KeptSets]], decisive: bool, in_order: bool
    ) -> list[tuple[Reading, bool | None, float | None]]:
        """Reading, whether the answer is back, and the text's score of each set. in_order: what stands behind the first repair is left open."""
        case, rows = self.case, self.measuring.rows
        chosen = [one for _, one in sets]
        readings = read_sets(self.model, case.full, case.witness, case.logits, case.tail, chosen, rows)
        shown = [decisive and reading.says_reference for reading in readings]
        last = shown.index(True) if in_order and True in shown else len(sets)
        asked = [i for i in range(len(sets)) if not shown[i] and i < last]
        scores = dict(zip(asked, self._scores([chosen[i] for i in asked]), strict=True))
        found: list[tuple[Reading, bool | None, float | None]] = []
        for i, reading in enumerate(readings):
            repaired = True if shown[i] else self._repairs(scores[i]) if i in scores else None
            found.append((reading, repaired, scores.get(i)))
        return found

    def _scores(self, sets: Sequence[KeptSets]) -> list[float]:
        """Scores of the sets' own answers, which may be a little longer than the reference."""
        case = self.case
        assert case.reference is not None
        limit = min(len(case.reference.ids) + self.measuring.answer_slack, case.sample.max_new_tokens)
        texts = answer_sets(self.model, case.full, case.logits, case.tail, sets, self.measuring.rows, self.stop(limit))
        return [self.score(text) for text in texts]

    def _repairs(self, score: float) -> bool:
        return not self.measuring.failing.fails(self.case.scores[FULL], score)


def _spec(spec: LayerSpec | None) -> LayerSpec:
    assert spec is not None, "a layer that has read a prompt knows its attention"
    return spec


def _replay(name: str, reading: Reading, repaired: bool | None, score: float | None, exchanged: float) -> Replay:
    return Replay(name=name, lowest=reading.lowest, score=score, repaired=repaired, exchanged=exchanged)  # type: ignore[arg-type]
