"""LongBench v2's metric: the letter behind "The correct answer is".

Source: THUDM/LongBench 2e00731, pred.py `extract_answer`. One rule is ours: an empty response counts as wrong. The
original leaves it out of the denominator, which would reward a model that compression made silent.
"""

from __future__ import annotations

import re

from kvpress_eval.sample import Sample
from kvpress_eval.scorers.base import Score, scorer

_PATTERNS = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))


@scorer("multiple_choice", version="longbench-v2-official")
def multiple_choice(prediction: str, sample: Sample) -> Score:
    """1 if the extracted letter is the reference's, else 0."""
    return Score(float(chosen_letter(prediction) == sample.answers[0]))


def chosen_letter(prediction: str) -> str | None:
    """The letter in brackets, else the bare one, asterisks left out; None if neither is there."""
    plain = prediction.replace("*", "")
    for pattern in _PATTERNS:
        found = pattern.search(plain)
        if found:
            return found[1]
    return None
