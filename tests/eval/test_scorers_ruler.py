"""RULER's substring metrics, and the traps T2, T9, T21 and T22 as far as they are about scoring."""

from __future__ import annotations

import pytest

from kvpress_eval.sample import Sample
from kvpress_eval.scorers import SCORERS, find_scorer


def value(metric: str, prediction: str, *answers: str) -> float:
    sample = Sample("0", "0", "", "", "", "", answers, metric, 30)
    return find_scorer(metric)(prediction, sample).value


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("The numbers are 111, 222 and 333.", 1.0),
        ("111 and 333", 2 / 3),
        ("none of them", 0.0),
        ("", 0.0),
        ("111222333", 1.0),
    ],
)
def test_all_is_the_fraction_of_references(prediction: str, expected: float) -> None:
    assert value("ruler_all", prediction, "111", "222", "333") == pytest.approx(expected)


def test_case_does_not_count() -> None:
    assert value("ruler_part", "it was PARIS", "Paris") == 1.0
    assert value("ruler_all", "abc", "ABC", "B") == 1.0


def test_control_characters_become_newlines_and_are_not_deleted() -> None:
    """Deleting them, as one harness does, would join "ab" and "cd"."""
    assert value("ruler_part", "ab\x07cd", "abcd") == 0.0
    assert value("ruler_part", "ab\x07cd", "ab\ncd") == 1.0
    assert value("ruler_part", "ab\tcd", "ab\tcd") == 0.0


def test_surrounding_whitespace_is_not_part_of_the_prediction() -> None:
    assert value("ruler_part", " \x00 yes \x1f\n", "yes\n") == 0.0
    assert value("ruler_part", "\n\nyes\n", "yes") == 1.0


@pytest.mark.parametrize("prediction", ["France", "in France", "the country of France, 10th century"])
def test_t9_part_is_the_maximum_over_references_not_their_fraction(prediction: str) -> None:
    assert value("ruler_part", prediction, "France", "in France", "Normandy") == 1.0


def test_t2_a_prompt_inside_the_prediction_scores_full_marks() -> None:
    """Why the prediction must be cut off the prompt by token count: the metric cannot tell."""
    prompt = "The magic number for apple is 4711. What is the magic number for apple?"
    assert value("ruler_all", "I do not know.", "4711") == 0.0
    assert value("ruler_all", prompt + "I do not know.", "4711") == 1.0


def test_t21_references_match_inside_longer_words_as_in_the_original() -> None:
    assert value("ruler_all", "Actually, that is a bad sale.", "act", "ad", "ale") == 1.0


def test_t22_only_what_follows_the_thinking_counts_in_the_variant() -> None:
    trace = "<think>Is it 111, 222 or 333?</think>It is 222."
    assert value("ruler_all", trace, "111", "222") == 1.0
    assert value("ruler_all-after_think", trace, "111", "222") == 0.5
    assert value("ruler_all-after_think", "111 or 222, let me see", "111", "222") == 0.0
    assert value("ruler_part-after_think", "a</think>b</think>c", "b") == 0.0


def test_t22_the_variant_is_opt_in_by_name_and_states_itself() -> None:
    for name, scorer in SCORERS.items():
        assert name.endswith("-after_think") == scorer.version.endswith("-after-think")
    assert find_scorer("ruler_all").version == "ruler-official"
