"""LongBench's synthetic metrics: the share of the numbers in the prediction that are the right one.

A verbose answer is penalized, and a prediction without a number scores 0.
Source: THUDM/LongBench 2e00731, LongBench/metrics.py.
"""

from __future__ import annotations

import re

from kvpress.errors import InputError
from kvpress_eval.sample import Sample
from kvpress_eval.scorers.base import Score, scorer
from kvpress_eval.scorers.longbench import OFFICIAL, best_reference


@scorer("count", version=OFFICIAL)
def count(prediction: str, sample: Sample) -> Score:
    """Against the reference itself, for passage_count."""
    return best_reference(share_of_numbers, prediction, sample)


@scorer("retrieval", version=OFFICIAL)
def retrieval(prediction: str, sample: Sample) -> Score:
    """Against the number in a reference such as "Paragraph 27"."""
    return best_reference(
        lambda guess, answer: share_of_numbers(guess, _number("Paragraph ", answer)), prediction, sample
    )


@scorer("retrieval_zh", version=OFFICIAL)
def retrieval_zh(prediction: str, sample: Sample) -> Score:
    """Against the number in a reference such as "段落27"."""
    return best_reference(lambda guess, answer: share_of_numbers(guess, _number("段落", answer)), prediction, sample)


def share_of_numbers(prediction: str, number: str) -> float:
    """Share of the runs of digits that are literally `number`, in [0, 1]."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def _number(label: str, answer: str) -> str:
    found = re.search(rf"{label}(\d+)", answer)
    if found is None:
        raise InputError(f"the reference '{answer[:60]}' names no paragraph: it must contain '{label}' and a number")
    return found[1]
