"""What every metric must do: full marks for a perfect answer, none for an empty one, and a name of its own."""

from __future__ import annotations

import pytest

from kvpress.errors import InputError
from kvpress_eval.sample import Sample
from kvpress_eval.scorers import SCORERS, find_scorer

ANSWERS = {
    "ruler_all": ("4711", "0815"),
    "ruler_part": ("Paris", "the city"),
    "classification": ("Date",),
    "count": ("12",),
    "retrieval": ("Paragraph 3",),
    "retrieval_zh": ("段落3",),
    "qa_f1_zh": ("清华大学",),
    "rouge_l_zh": ("会议总结。大家同意。",),
    "code_sim": ("    return self.value",),
    "multiple_choice": ("C",),
    "needle_keyword": ("Ghost Pearl",),
    "needle_keyword_v1": ("Ghost Pearl",),
    "needle_parallel": ("Ghost Pearl", "Dream Bubble"),
    "boxed": ("Dan Newton",),
}
PERFECT = {
    "ruler_all": "4711 and 0815",
    "multiple_choice": "The correct answer is (C).",
    "needle_parallel": "Ghost Pearl, Dream Bubble",
    "boxed": r"\boxed{Dan Newton}",
}


@pytest.mark.parametrize("metric", sorted(SCORERS))
def test_perfect_scores_one_and_empty_scores_zero(metric: str) -> None:
    base = metric.split("-")[0]
    answers = ANSWERS.get(base, ("The senate agreed on a budget. It was large.",))
    evidence = ("Hidden on Hell Island is the legendary Ghost Pearl.",)
    sample = Sample(
        id="0",
        cluster="0",
        lead="",
        context="",
        question="",
        answer_prefix="",
        answers=answers,
        metric=metric,
        max_new_tokens=64,
        all_classes=("Date", "City"),
        evidence=evidence,
        meta={"depths": [0, 50]},
    )
    perfect = PERFECT.get(base, answers[0])
    if metric.endswith("-after_think"):
        perfect = f"<think>hm</think>{perfect}"
    assert find_scorer(metric)(perfect, sample).value == pytest.approx(1.0, abs=1e-7)
    assert find_scorer(metric)("", sample).value == 0.0


def test_every_deviation_says_so_in_its_version() -> None:
    official = {name for name, scorer in SCORERS.items() if "official" in scorer.version}
    assert {"qa_f1", "rouge_l", "classification-firstline", "code_sim", "ruler_all"} <= official
    assert not {"code_sim-indel", "code_sim-v6line"} & official


def test_versions_are_unambiguous_for_what_differs() -> None:
    code = [SCORERS[name].version for name in ("code_sim", "code_sim-indel", "code_sim-v6line")]
    assert len(set(code)) == 3


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(InputError, match="did you mean 'rouge_l'"):
        find_scorer("rougel")
