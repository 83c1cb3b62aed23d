"""NeedleBench's metrics against values worked out by hand from opencompass' rules."""

from __future__ import annotations

from typing import Any

import pytest

from kvpress_eval.sample import Sample
from kvpress_eval.scorers import Score, find_scorer


def score(metric: str, prediction: str, *answers: str, evidence: tuple[str, ...] = (), **meta: Any) -> Score:
    sample = Sample("0", "0", "", "", "", "", answers, metric, 400, evidence=evidence, meta=meta)
    return find_scorer(metric)(prediction, sample)


def test_a_keyword_is_case_sensitive_and_may_be_part_of_a_word() -> None:
    assert score("needle_keyword", "It is the Ghost Pearl.", "Ghost Pearl").value == 1.0
    assert score("needle_keyword", "the ghost pearl", "Ghost Pearl").value == 0.0
    assert score("needle_keyword", "GhostPearls", "Ghost").value == 1.0
    assert score("needle_keyword", "Ghost\nPearl", "Ghost Pearl").value == 0.0


def test_version_1_gives_a_similar_wrong_answer_up_to_a_fifth() -> None:
    needle = "\nabcd ef\n"
    assert score("needle_keyword_v1", "it is ef", "ef", evidence=(needle,)).value == 1.0
    # "abXd" against "abcdef": one substitution and two insertions, six characters
    assert score("needle_keyword_v1", "ab Xd", "ef", evidence=(needle,)).value == pytest.approx(0.2 * 0.5)
    assert score("needle_keyword_v1", "", "ef", evidence=(needle,)).value == 0.0
    # wrong but similar: v1 and v2 must not be mixed
    assert score("needle_keyword", "ab Xd", "ef", evidence=(needle,)).value == 0.0


def test_parallel_scores_every_depth_and_their_mean_is_the_value() -> None:
    answers = ("Star", "Pearl", "Flame", "Clover")
    found = score("needle_parallel", "Flame, Pearl and star", *answers, depths=[0, 30, 60, 100])
    assert found.parts == {"depth 0": 0.0, "depth 30": 1.0, "depth 60": 1.0, "depth 100": 0.0}
    assert found.value == 0.5 == sum(found.parts.values()) / 4


def test_parallel_refuses_depths_that_do_not_fit_the_answers() -> None:
    with pytest.raises(ValueError, match="zip"):
        score("needle_parallel", "Star", "Star", "Pearl", depths=[0])


@pytest.mark.parametrize(
    "prediction",
    [
        r"So it is \boxed{Dan Newton}.",
        r"\boxed{Kevin Le}, no: \boxed{Dan Newton}",
        r"\boxed{\text{Dan Newton}}",
        r"$\boxed{{Dan Newton}}$",
        r"\boxed{ Dan   Newton }",
        r"\boxed{Dan~Newton}",
        r"\boxed{'Dan Newton'}",
        r"\boxed{\[Dan Newton\]}",
        r"\boxed{\boxed{Dan Newton}}",
    ],
)
def test_boxed_answers_that_count(prediction: str) -> None:
    assert score("boxed", prediction, "Dan Newton").value == 1.0


@pytest.mark.parametrize(
    "prediction",
    [
        "",
        "Dan Newton",
        r"\boxed{dan newton}",
        r"\boxed{Dan Newton Jr}",
        r"\boxed{Dan Newton} or \boxed{Kevin Le}",  # the last box counts
        r"\boxed{Dan Newton} \boxed{Kevin Le",  # and is not closed here
        r"\boxed{Dan Newton} \boxed{}",
        r"\boxed Dan Newton",
        r"\fbox{Dan Newton}",
        r"\boxed{Dan {Newton}}",
    ],
)
def test_boxed_answers_that_do_not_count(prediction: str) -> None:
    assert score("boxed", prediction, "Dan Newton").value == 0.0


def test_boxed_numbers_are_compared_as_text() -> None:
    assert score("boxed", r"\boxed{5}", "5").value == 1.0
    assert score("boxed", r"\boxed{5.0}", "5").value == 0.0
