"""What all metrics of LongBench share: the best reference counts, and for four sets only the first line.

Source: THUDM/LongBench 2e00731, LongBench/eval.py.
"""

from __future__ import annotations

from collections.abc import Callable

from kvpress_eval.sample import Sample
from kvpress_eval.scorers.base import Score

OFFICIAL = "longbench-official"


def best_reference(similarity: Callable[[str, str], float], prediction: str, sample: Sample) -> Score:
    """The largest similarity(prediction, reference), in [0, 1]."""
    return Score(max(similarity(prediction, answer) for answer in sample.answers))


def first_line(prediction: str) -> str:
    """The rule of trec, triviaqa, samsum and lsht: leading newlines do not count, a space before them does."""
    return prediction.lstrip("\n").split("\n")[0]
