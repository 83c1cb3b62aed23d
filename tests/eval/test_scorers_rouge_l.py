"""ROUGE-L against the package that LongBench calls, by hand, and where the package fails (T12)."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge import Rouge

from kvpress_eval.sample import Sample
from kvpress_eval.scorers import find_scorer
from kvpress_eval.scorers.rouge_l import rouge_l_f


def package_score(prediction: str, reference: str) -> float:
    """LongBench's call: any failure of the package is a 0."""
    try:
        return float(Rouge().get_scores([prediction], [reference], avg=True)["rouge-l"]["f"])
    except Exception:
        return 0.0


def random_text(rng: random.Random, words: int, vocabulary: int) -> str:
    ends = [" ", " ", " ", ". ", ".", " . ", "\n", "\t", "  "]
    return "".join(f"w{rng.randrange(vocabulary)}{rng.choice(ends)}" for _ in range(words))


def test_equals_the_package_on_random_texts() -> None:
    rng = random.Random(0)
    for _ in range(150):
        vocabulary = rng.choice([3, 10, 60])
        prediction = random_text(rng, rng.randrange(60), vocabulary)
        reference = random_text(rng, rng.randrange(60), vocabulary)
        assert rouge_l_f(prediction, reference) == package_score(prediction, reference)


@settings(max_examples=150, deadline=None)
@given(
    st.text(alphabet="ab. \n\té。\u3000\u00a0", max_size=60),
    st.text(alphabet="ab. \n\té。\u3000\u00a0", max_size=60),
)
def test_equals_the_package_on_hostile_texts(prediction: str, reference: str) -> None:
    assert rouge_l_f(prediction, reference) == package_score(prediction, reference)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80), st.text(max_size=80))
def test_equals_the_package_on_unicode(prediction: str, reference: str) -> None:
    assert rouge_l_f(prediction, reference) == package_score(prediction, reference)


@pytest.mark.parametrize("nothing", ["", ".", "...", ". .".replace(" ", "")])
def test_nothing_but_full_stops_scores_zero(nothing: str) -> None:
    assert rouge_l_f(nothing, "a b c") == rouge_l_f("a b c", nothing) == 0.0


def test_by_hand() -> None:
    # the LCS of "a b c d" and "a c d e" is a c d: precision 3/4, recall 3/4
    assert rouge_l_f("a b c d", "a c d e") == pytest.approx(0.75, abs=1e-7)
    # sets of word types: "a a a b" has two, and both are matched; the reference has three
    assert rouge_l_f("a a a b", "a b c") == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3), abs=1e-7)
    # order counts within a sentence, not between sentences
    assert rouge_l_f("c d. a b", "a b. c d") == pytest.approx(
        # the blank in front of "a" and "c" is stripped, so each text has four types and all are matched
        1.0,
        abs=1e-7,
    )
    assert rouge_l_f("d c b a", "a b c d") == pytest.approx(0.25, abs=1e-7)


def test_a_blank_sentence_is_an_empty_word_as_in_the_package() -> None:
    # "x. " holds the words x and "": one of two matched on one side, one of one on the other
    assert rouge_l_f("x. ", "x") == pytest.approx(2 * 0.5 * 1 / 1.5, abs=1e-7)
    assert rouge_l_f(" ", "x") == 0.0


def test_t12_a_long_sentence_scores_what_the_definition_says() -> None:
    """The package gives up beyond about 550 words without a full stop, and LongBench writes a 0."""
    words = [f"w{number}" for number in range(2000)]
    reference = " ".join(words[::4])
    assert package_score(" ".join(words), reference) == 0.0
    precision, recall = 0.25, 1.0
    start = time.perf_counter()
    score = rouge_l_f(" ".join(words), reference)
    assert score == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-7)
    assert time.perf_counter() - start < 5


def test_t12_looping_output_is_scored_and_fast() -> None:
    loop = "the cat sat on the mat " * 400
    start = time.perf_counter()
    assert rouge_l_f(loop, "the cat sat on the mat") == pytest.approx(1.0, abs=1e-7)
    assert rouge_l_f("I see. " * 2000, "I see") == pytest.approx(2 * (2 / 3) / (5 / 3), abs=1e-7)
    assert time.perf_counter() - start < 5


def test_best_reference_counts_and_first_line_is_a_rule_of_its_own() -> None:
    sample = Sample("0", "0", "", "", "", "", ("x y", "a b"), "rouge_l", 128)
    assert find_scorer("rouge_l")("a b", sample).value == pytest.approx(1.0, abs=1e-7)
    two_lines = "\n\na b\nDialogue: c d e f"
    assert find_scorer("rouge_l-firstline")(two_lines, sample).value == pytest.approx(1.0, abs=1e-7)
    assert find_scorer("rouge_l")(two_lines, sample).value < 0.6


def test_chinese_texts_are_cut_into_words_first() -> None:
    sample = Sample("0", "0", "", "", "", "", ("我来到北京清华大学",), "rouge_l_zh", 128)
    # jieba: 我 / 来到 / 北京 / 清华大学; three of the four words in order
    assert find_scorer("rouge_l_zh")("我来到清华大学", sample).value == pytest.approx(2 * 0.75 / 1.75, abs=1e-7)
    assert find_scorer("rouge_l")("我来到清华大学", sample).value == 0.0
    assert find_scorer("rouge_l_zh")("", sample).value == 0.0
