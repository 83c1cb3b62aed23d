"""One cell of a run: a task, a length and a mode, with the records of every arm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvpress_eval.records import FULL, FULL_REPEAT, Mode, Record
from kvpress_eval.report.rows import Cost, NoiseRow, Row, Scope, points
from kvpress_eval.statistics import Estimate, Pairs, mcnemar, noise_floor, pair, retention, sign_flip, within_noise
from kvpress_eval.statistics.interval import MIN_CLUSTERS, Interval
from kvpress_eval.statistics.retention import threshold
from kvpress_eval.statistics.strata import generator

#: a task is at the floor where the full cache scores at most this: there is nothing to lose
FLOOR = 0.05
#: and at the ceiling where the full cache and every arm reach this: it tells no arms apart
CEILING = 0.98


@dataclass(frozen=True)
class Cell:
    """arms: records by arm, the full cache among them. planned: samples that the sweep asked for. seed: of resampling."""

    family: str
    task: str
    length: int | None
    mode: Mode
    arms: Mapping[str, Sequence[Record]]
    in_macro: bool = True
    planned: int = 0
    seed: int = 0

    @property
    def full(self) -> Sequence[Record]:
        return self.arms[FULL]

    @property
    def compared(self) -> list[str]:
        """Arms with a contract: all but the full cache and its repeat."""
        return [arm for arm in self.arms if arm not in (FULL, FULL_REPEAT)]

    @property
    def scope(self) -> Scope:
        """Whether the task enters a macro average. Floor and ceiling are read off scores, `in_macro` is the task's own."""
        if not self.in_macro:
            return "not averaged"
        means = [_mean_score(self.arms[arm]) for arm in (FULL, *self.compared)]
        if means[0] <= FLOOR or min(means) >= CEILING:
            return "floor or ceiling"
        return "informative"

    def pairs(self, arm: str) -> Pairs:
        return pair(self.full, self.arms[arm])

    def repeats(self) -> Pairs | None:
        """The full cache's second run against its first, None where there was none."""
        pairs = self.pairs(FULL_REPEAT) if FULL_REPEAT in self.arms else None
        return pairs if pairs is not None and len(pairs) else None

    def noise(self, pairs: Pairs) -> NoiseRow:
        """The noise floor, from `repeats`."""
        texts = {record.sample: record.prediction for record in self.full}
        floor = noise_floor(pairs, threshold(self.full[0].metric), "noise", *self._name, seed=self.seed)
        other = sum(
            texts.get(record.sample, record.prediction) != record.prediction for record in self.arms[FULL_REPEAT]
        )
        return NoiseRow(
            family=self.family,
            task=self.task,
            length=self.length,
            mode=self.mode,
            n=floor.n,
            other_text=other,
            changed=floor.changed,
            flips=floor.flips,
            delta=100 * floor.difference,
            delta_low=points(floor.difference_interval.low),
            delta_high=points(floor.difference_interval.high),
            mean_abs=100 * floor.mean_abs,
            ci_low=points(floor.low),
            ci_high=points(floor.high),
        )

    def row(self, arm: str, pairs: Pairs, noise: NoiseRow | None, margin: float) -> Row:
        """The row of one arm; its p values are adjusted, and the verdict is given, once all rows are known.

        Raises:
            ValueError: there are no pairs.
        """
        if not len(pairs):
            raise ValueError(f"no sample of '{self.task}' has both '{arm}' and the full cache")
        common = set(pairs.samples)
        records = [record for record in self.arms[arm] if record.sample in common]
        score = Estimate.of_scores(pairs.arm.tolist(), pairs.clusters, "score", *self._name, seed=self.seed)
        score_interval = score.interval()
        difference = Estimate.of_differences(pairs, *self._name, seed=self.seed)
        interval = difference.interval()
        is_full, tested = arm == FULL, arm != FULL and score.strata[0].n_clusters >= MIN_CLUSTERS
        kept = retention(pairs, threshold(records[0].metric))
        delta = None if is_full else 100 * difference.mean
        return Row(
            family=self.family,
            task=self.task,
            length=self.length,
            mode=self.mode,
            arm=arm,
            metric=records[0].metric,
            n=len(pairs),
            n_clusters=score.strata[0].n_clusters,
            missing=pairs.unpaired_full,
            extra=pairs.unpaired_arm,
            incomplete=len(pairs) < max(self.planned, len(self.full)) and arm != FULL_REPEAT,
            score=100 * score.mean,
            score_low=points(score_interval.low),
            score_high=points(score_interval.high),
            full_score=100 * float(pairs.full.mean()),
            delta=delta,
            ci_low=None if is_full else points(interval.low),
            ci_high=None if is_full else points(interval.high),
            lower_bound=None if is_full else points(difference.lower_bound()),
            interval="none" if is_full else difference.rule,
            p=self._p(pairs) if tested else None,
            p_adjusted=None,
            p_no_loss=None if is_full else difference.p_no_loss(margin),
            test="none" if not tested else "McNemar mid-p" if pairs.is_binary else "sign flip by cluster",
            verdict=None,
            within_noise=None if delta is None else _in_noise(delta, noise),
            lost=pairs.lost,
            gained=pairs.gained,
            solved=kept.solved,
            kept=kept.kept,
            retention=points(kept.share),
            retention_low=points(kept.low),
            retention_high=points(kept.high),
            truncated=sum(record.n_cut > 0 for record in records),
            evidence_lost=sum("evidence_cut" in record.flags for record in records),
            in_macro=self.in_macro,
            scope=self.scope,
            cost=cost(records),
            flags=dict(sorted(Counter(flag for record in records for flag in record.flags).items())),
        )

    @property
    def _name(self) -> tuple[object, ...]:
        # without the arm: arms of a cell share their resamples, so their intervals differ by their scores alone
        return self.task, self.length, self.mode

    def _p(self, pairs: Pairs) -> float:
        if pairs.is_binary:
            return mcnemar(pairs.lost, pairs.gained)
        return sign_flip([pairs.differences], generator(self.seed, "flip", *self._name))


def cost(records: Sequence[Record]) -> Cost:
    """Means over the records of one arm; there must be one."""
    seconds, alone = [record.seconds for record in records], all(record.decode_rows == 1 for record in records)
    decode = sum(part.decode for part in seconds)
    kept_bytes, full_bytes = _mean([r.kept_bytes for r in records]), _mean([r.full_bytes for r in records])
    return Cost(
        kept_bytes=kept_bytes,
        full_bytes=full_bytes,
        byte_share=kept_bytes / full_bytes if full_bytes else 1.0,
        kept_share=_mean([record.kept_share for record in records]),
        prefill_seconds=_mean([part.prefill for part in seconds]),
        evidence_seconds=_mean([part.evidence for part in seconds]),
        eviction_seconds=_mean([part.eviction for part in seconds]),
        decode_tokens_per_second=sum(r.n_new for r in records) / decode if alone and decode > 0 else None,
        decode_rows=max(record.decode_rows for record in records),
        new_tokens=_mean([record.n_new for record in records]),
    )


def _in_noise(delta: float, noise: NoiseRow | None) -> bool | None:
    return None if noise is None else within_noise(delta, noise.n, Interval(noise.delta_low, noise.delta_high))


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values))


def _mean_score(records: Sequence[Record]) -> float:
    return _mean([record.score for record in records])
