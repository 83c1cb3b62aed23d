"""The worst losses: items that the full cache solves and an arm does not, with both answers to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvpress_eval.records import FULL, FULL_REPEAT, Mode, Record
from kvpress_eval.statistics.retention import threshold

PER_ARM = 4
PER_TASK_AND_ARM = 1
_SHOWN_CHARACTERS = 400


@dataclass(frozen=True)
class Loss:
    """One item. scores in points; texts are cut in the middle. others: arms of this mode that lost the item as well."""

    family: str
    task: str
    length: int | None
    sample: str
    mode: Mode
    arm: str
    full_score: float
    score: float
    question: str
    answers: tuple[str, ...]
    full_prediction: str
    prediction: str
    others: int
    n_arms: int


def worst_losses(cells: Sequence[Mapping[str, Sequence[Record]]]) -> list[Loss]:
    """Losses of each arm, largest first and of different tasks; an item that few other arms lost comes first.

    cells: records by arm, for each task, length and mode.
    """
    candidates: list[Loss] = []
    for arms in cells:
        full = {record.sample: record for record in arms[FULL] if record.score >= threshold(record.metric)}
        losers = [
            record
            for arm, records in arms.items()
            if arm not in (FULL, FULL_REPEAT)
            for record in records
            if record.sample in full and record.score < threshold(record.metric)
        ]
        by_sample = Counter(record.sample for record in losers)
        n_arms = sum(arm not in (FULL, FULL_REPEAT) for arm in arms)
        candidates += [_loss(full[r.sample], r, by_sample[r.sample] - 1, n_arms) for r in losers]
    candidates.sort(key=lambda loss: (loss.score - loss.full_score, loss.others, loss.task, loss.sample))
    chosen: list[Loss] = []
    of_arm: Counter[tuple[str, str]] = Counter()
    of_task: Counter[tuple[str, str, str]] = Counter()
    for loss in candidates:
        arm, task = (loss.mode, loss.arm), (loss.mode, loss.arm, loss.task)
        if of_arm[arm] < PER_ARM and of_task[task] < PER_TASK_AND_ARM:
            of_arm[arm] += 1
            of_task[task] += 1
            chosen.append(loss)
    return sorted(chosen, key=lambda loss: (loss.mode, loss.arm, loss.score - loss.full_score))


def _loss(full: Record, arm: Record, others: int, n_arms: int) -> Loss:
    return Loss(
        family=arm.family,
        task=arm.task,
        length=arm.length,
        sample=arm.sample,
        mode=arm.mode,
        arm=arm.arm,
        full_score=100 * full.score,
        score=100 * arm.score,
        question=shorten(arm.question),
        answers=tuple(shorten(answer, 120) for answer in arm.answers[:12]),
        full_prediction=shorten(full.prediction),
        prediction=shorten(arm.prediction),
        others=others,
        n_arms=n_arms,
    )


def shorten(text: str, characters: int = _SHOWN_CHARACTERS) -> str:
    """Text without what would not be seen or would move its surroundings, cut in the middle.

    Line breaks stay; other control characters and marks that turn the writing direction are shown by their number.
    """
    shown = "".join(c if c == "\n" or c.isprintable() else f"[U+{ord(c):04X}]" for c in text.strip())
    if len(shown) <= characters:
        return shown
    half = (characters - 5) // 2
    return f"{shown[:half]} […] {shown[-half:]}"
