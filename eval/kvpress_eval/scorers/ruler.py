"""RULER's two metrics: lower-cased substring tests on a cleaned prediction.

Source: NVIDIA/RULER c3f5e3b, scripts/eval/evaluate.py and scripts/eval/synthetic/constants.py. Substrings need no word
boundary, so a long output scores by chance; the generated length must be capped at the official value.
"""

from __future__ import annotations

import re

from kvpress_eval.sample import Sample
from kvpress_eval.scorers.base import Score, scorer

_CONTROL = re.compile(r"[\x00-\x1f]")


@scorer("ruler_all", version="ruler-official")
def ruler_all(prediction: str, sample: Sample) -> Score:
    """Fraction of the references that the prediction contains (`string_match_all`)."""
    found = _found(prediction, sample)
    return Score(sum(found) / len(found))


@scorer("ruler_part", version="ruler-official")
def ruler_part(prediction: str, sample: Sample) -> Score:
    """1 if the prediction contains any of the references (`string_match_part`)."""
    return Score(float(any(_found(prediction, sample))))


def _found(prediction: str, sample: Sample) -> list[bool]:
    clean = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    return [answer.lower() in clean for answer in sample.answers]
