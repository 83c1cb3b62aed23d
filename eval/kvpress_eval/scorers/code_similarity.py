"""LongBench's code metric: similarity of one line of the prediction to the reference line, in whole percent.

The official score is fuzzywuzzy's `ratio`, which depends on what else is installed: without python-Levenshtein, as in
LongBench's requirements, it is difflib's, otherwise the Indel similarity. The two differ by several points, so the
backend is part of the name.
Source: THUDM/LongBench 2e00731, LongBench/metrics.py; fuzzywuzzy 0.18, fuzz.py; line rule of `-v6line`:
lm-evaluation-harness, pull request 3921.
"""

from __future__ import annotations

import difflib

from kvpress_eval.sample import Sample
from kvpress_eval.scorers.alignment import indel_similarity
from kvpress_eval.scorers.base import Score, scorer
from kvpress_eval.scorers.longbench import OFFICIAL, best_reference

_NO_CODE = ("`", "#", "//")


@scorer("code_sim", version=f"{OFFICIAL}-difflib")
def code_sim(prediction: str, sample: Sample) -> Score:
    """The official metric: difflib, first line without a fence or a comment, be it blank."""
    return best_reference(difflib_ratio, code_line(prediction), sample)


@scorer("code_sim-indel", version="longbench-indel")
def code_sim_indel(prediction: str, sample: Sample) -> Score:
    """A deviation: what fuzzywuzzy gives where python-Levenshtein is installed."""
    return best_reference(indel_ratio, code_line(prediction), sample)


@scorer("code_sim-v6line", version="longbench-v6line-difflib")
def code_sim_v6_line(prediction: str, sample: Sample) -> Score:
    """A deviation: blank lines are skipped, as in version 6 of the task in lm-evaluation-harness."""
    return best_reference(difflib_ratio, code_line(prediction, skip_blank=True), sample)


def code_line(prediction: str, *, skip_blank: bool = False) -> str:
    """The first line that has no fence and no comment; its indentation stays. Empty if there is none."""
    for line in prediction.lstrip("\n").split("\n"):
        if not any(mark in line for mark in _NO_CODE) and (line.strip() or not skip_blank):
            return line
    return ""


def difflib_ratio(prediction: str, reference: str) -> float:
    """`difflib.SequenceMatcher.ratio` in whole percent, in [0, 1]. It is not symmetric."""
    return round(100 * difflib.SequenceMatcher(None, prediction, reference).ratio()) / 100


def indel_ratio(prediction: str, reference: str) -> float:
    """Indel similarity in whole percent, in [0, 1]."""
    return round(100 * indel_similarity(prediction, reference)) / 100
