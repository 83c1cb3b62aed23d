"""LongBench's classification metric, for trec and lsht, with the behaviour of its list that shrinks while it is read.

Source: THUDM/LongBench 2e00731, LongBench/metrics.py `classification_score`.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvpress_eval.sample import Sample
from kvpress_eval.scorers.base import Score, scorer
from kvpress_eval.scorers.longbench import OFFICIAL, best_reference, first_line


@scorer("classification", version=OFFICIAL)
def classification(prediction: str, sample: Sample) -> Score:
    """1 / (number of classes named in the prediction) if the right one is among them, else 0; best reference."""
    return best_reference(lambda guess, answer: class_score(guess, answer, sample.all_classes), prediction, sample)


@scorer("classification-firstline", version=OFFICIAL)
def classification_first_line(prediction: str, sample: Sample) -> Score:
    """`classification` of the first line, as trec and lsht have it."""
    return classification(first_line(prediction), sample)


def class_score(prediction: str, answer: str, all_classes: Sequence[str]) -> float:
    """Score in [0, 1]. Classes that are a proper part of the right one's name are not held against it, but the
    original removes them from the list that it walks over, so the class behind a removed one is never looked at.
    """
    named = [name for name in all_classes if name in prediction]
    position = 0
    while position < len(named):
        name = named[position]
        if name in answer and name != answer:
            named.remove(name)
        position += 1
    return 1.0 / len(named) if answer in named else 0.0
