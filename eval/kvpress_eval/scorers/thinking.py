"""Opt-in variants of all metrics for models that think aloud: only what follows the last "</think>" is scored.

A trace names every candidate on its way and so passes substring tests, or uses up the budget before the answer. The
variant of metric `m` is `m-after_think`; a prediction that never finished thinking counts as an empty one.
"""

from __future__ import annotations

from kvpress_eval.sample import Sample
from kvpress_eval.scorers import (
    classification,
    code_similarity,
    multiple_choice,
    needlebench,
    numbers,
    rouge_l,
    ruler,
    token_f1,
)
from kvpress_eval.scorers.base import SCORERS, Score, Scorer, scorer

#: modules whose metrics get the variant: they must have registered theirs before this one does
_MODULES = (classification, code_similarity, multiple_choice, needlebench, numbers, rouge_l, ruler, token_f1)


def after_thinking(prediction: str) -> str:
    """What follows the last closing mark; nothing if there is none."""
    return prediction.rpartition("</think>")[2] if "</think>" in prediction else ""


def _register_variant(original: Scorer) -> None:
    @scorer(f"{original.name}-after_think", version=f"{original.version}-after-think")
    def variant(prediction: str, sample: Sample) -> Score:
        return original(after_thinking(prediction), sample)


for _module in _MODULES:
    for _scorer in [entry for entry in SCORERS.values() if entry.metric.__module__ == _module.__name__]:
        _register_variant(_scorer)
