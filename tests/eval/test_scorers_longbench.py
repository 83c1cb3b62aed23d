"""LongBench's other metrics against values worked out by hand or taken from the libraries that it calls."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import pytest

from kvpress.errors import InputError
from kvpress_eval.sample import Sample
from kvpress_eval.scorers import chinese, find_scorer
from kvpress_eval.scorers.alignment import indel_similarity, lcs_length, lcs_table, levenshtein


def value(metric: str, prediction: str, *answers: str, classes: tuple[str, ...] = ()) -> float:
    sample = Sample("0", "0", "", "", "", "", answers, metric, 64, all_classes=classes)
    return find_scorer(metric)(prediction, sample).value


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("The cat!", "cat", 1.0),
        ("a cat, an owl and the dog", "cat owl dog", 2 * (3 / 4) * 1 / (3 / 4 + 1)),
        ("cat cat", "cat", 2 * 0.5 * 1 / 1.5),
        ("well-known", "wellknown", 1.0),
        ("well-known", "well known", 0.0),
        ("don't", "dont", 1.0),
        ("theatre", "atre", 0.0),
        ("dog", "cat", 0.0),
        ("the", "a", 0.0),
        ("“cat”", "cat", 0.0),  # only ASCII punctuation goes
        ("A.N. Other", "an other", 2 * (1 / 1) * (1 / 1) / 2),  # "A.N." becomes the article "an"
    ],
)
def test_qa_f1(prediction: str, answer: str, expected: float) -> None:
    assert value("qa_f1", prediction, answer) == pytest.approx(expected)


def test_the_best_reference_counts() -> None:
    assert value("qa_f1", "new york city", "boston", "new york", "city of new york") == pytest.approx(6 / 7)


def test_the_first_line_is_cut_at_newlines_only() -> None:
    assert value("qa_f1-firstline", "\n\nParis\nPassage: more", "Paris") == 1.0
    assert value("qa_f1-firstline", " \nParis", "Paris") == 0.0  # a space in front is a first line
    assert value("qa_f1", "\n\nParis\nPassage: more", "Paris") == pytest.approx(0.5)


def test_qa_f1_zh() -> None:
    # jieba: 我 / 来到 / 北京 / 清华大学, and the comma and the full stop are dropped
    assert value("qa_f1_zh", "我来到，清华大学。", "我来到北京清华大学") == pytest.approx(2 * 1 * 0.75 / 1.75)
    assert value("qa_f1_zh", "「ML」", "ml") == 1.0
    # the original's list of punctuation has the closing bracket of this pair only
    assert value("qa_f1_zh", "《ML》", "ml") == pytest.approx(2 / 3)
    assert value("qa_f1_zh", "", "北京") == value("qa_f1_zh", "。！", "北京") == 0.0


def test_a_missing_segmenter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., Any] = builtins.__import__

    def without_jieba(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "jieba":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    chinese._segmenter.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without_jieba)
    with pytest.raises(InputError, match="jieba"):
        value("qa_f1_zh", "北京", "北京")


@pytest.mark.parametrize(
    ("metric", "prediction", "answer", "expected"),
    [
        ("count", "The answer is 7", "7", 1.0),
        ("count", "7, because 7 of 10", "7", 2 / 3),
        ("count", "17", "7", 0.0),
        ("count", "07", "7", 0.0),
        ("count", "seven", "7", 0.0),
        ("retrieval", "Paragraph 27", "Paragraph 27", 1.0),
        ("retrieval", "27", "Paragraph 27", 1.0),
        ("retrieval", "Paragraph 2 or 27", "Paragraph 27", 0.5),
        ("retrieval", "1 2 3 4", "Paragraph 3", 0.25),
        ("retrieval_zh", "段落27", "段落27", 1.0),
        ("retrieval_zh", "段落2和27", "段落27", 0.5),
    ],
)
def test_shares_of_numbers(metric: str, prediction: str, answer: str, expected: float) -> None:
    assert value(metric, prediction, answer) == pytest.approx(expected)


def test_a_retrieval_reference_without_a_number_is_refused() -> None:
    with pytest.raises(InputError, match="Paragraph"):
        value("retrieval", "3", "the third")


@pytest.mark.parametrize(
    ("prediction", "answer", "classes", "expected"),
    [
        ("Type: Date", "Date", ("Date", "City"), 1.0),
        ("Date or City", "Date", ("Date", "City", "Sport"), 1 / 2),
        ("Date, City, Sport", "Date", ("Date", "City", "Sport"), 1 / 3),
        ("City", "Date", ("Date", "City"), 0.0),
        ("date", "Date", ("Date", "City"), 0.0),  # case counts
        ("", "Date", ("Date", "City"), 0.0),
        # a proper part of the right name is not held against it ...
        ("Other location", "Other location", ("Other", "Other location"), 1.0),
        # ... but the name behind a removed one is skipped: "location" stays
        ("Other location", "Other location", ("Other", "location", "Other location"), 1 / 2),
        # with another name between them, both are removed and the other one stays
        ("Other location Date", "Other location", ("Other", "Date", "location", "Other location"), 1 / 2),
        ("abc", "abc", ("a", "b", "c", "ab", "abc"), 1 / 3),  # a, c removed; b, ab, abc stay
    ],
)
def test_t13_classification_mutates_its_list_while_walking_it(
    prediction: str, answer: str, classes: tuple[str, ...], expected: float
) -> None:
    assert value("classification", prediction, answer, classes=classes) == pytest.approx(expected)


def test_t13_equals_a_python_loop_that_removes_from_its_own_list() -> None:
    names = ("a", "ab", "abc", "b", "bc", "c", "d")
    for mask in range(1, 128):
        named = [name for index, name in enumerate(names) if mask >> index & 1]
        prediction = " ".join(named)
        contained = [name for name in names if name in prediction]
        for name in contained:
            if name in "abc" and name != "abc":
                contained.remove(name)
        expected = 1 / len(contained) if "abc" in contained else 0.0
        assert value("classification", prediction, "abc", classes=names) == pytest.approx(expected), prediction


def test_classification_reads_the_first_line_where_the_set_says_so() -> None:
    text = "Date\nQuestion: where? Type: City"
    assert value("classification-firstline", text, "Date", classes=("Date", "City")) == 1.0
    assert value("classification", text, "Date", classes=("Date", "City")) == 0.5


@pytest.mark.parametrize(
    ("prediction", "answer", "difflib_percent", "indel_percent"),
    # fuzzywuzzy 0.18 without python-Levenshtein, and rapidfuzz 3.14.6 `fuzz.ratio` rounded
    [
        ("    return self.value", "    return self.values", 98, 98),
        ("for i in range(10):", "while True:", 20, 33),
        ("import os", "from os import path", 50, 50),
        ("public static void main", "private void main(String[] args)", 51, 51),
        ("tide", "diet", 25, 50),
        ("diet", "tide", 50, 50),
        ("", "abc", 0, 0),
        ("a", "a", 100, 100),
        ("x" * 120 + " = value + other" + "y" * 120, "y" * 130 + " = value * other" + "x" * 100, 6, 48),
    ],
)
def test_t11_code_similarity_names_its_backend(
    prediction: str, answer: str, difflib_percent: int, indel_percent: int
) -> None:
    assert value("code_sim", prediction, answer) == pytest.approx(difflib_percent / 100)
    assert value("code_sim-indel", prediction, answer) == pytest.approx(indel_percent / 100)
    assert "difflib" in find_scorer("code_sim").version
    assert "indel" in find_scorer("code_sim-indel").version


@pytest.mark.parametrize(
    "fence", ["```python\n", "# a comment\n", "// a comment\n", "\n\n", "\n```\n# x\n", "url = 'http://x'\n"]
)
def test_code_similarity_skips_fences_and_comments(fence: str) -> None:
    assert value("code_sim", fence + "    x = 1\nmore", "    x = 1") == 1.0


def test_code_similarity_of_comments_alone_is_zero() -> None:
    assert value("code_sim", "# nothing\n// here", "x = 1") == 0.0


def test_t10_a_blank_first_line_scores_zero_officially_and_is_skipped_by_v6line() -> None:
    prediction = " \n\t\n    x = 1\nmore"
    assert value("code_sim", prediction, "    x = 1") < 0.25
    assert value("code_sim-v6line", prediction, "    x = 1") == 1.0
    assert value("code_sim-v6line", "    x = 1", "    x = 1") == 1.0  # indentation stays
    assert value("code_sim-v6line", "# no\n \nx = 1", "x = 1") == 1.0
    assert "v6line" in find_scorer("code_sim-v6line").version


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("The correct answer is (B).", "B"),
        ("The correct answer is B", "B"),
        ("**The correct answer is (B)**", "B"),
        ("The correct answer is **B**", "B"),
        ("The correct answer is A, no: The correct answer is (B)", "B"),  # brackets first
        ("The correct answer is (B). The correct answer is (C).", "B"),
    ],
)
def test_multiple_choice_extraction(prediction: str, letter: str) -> None:
    assert value("multiple_choice", prediction, letter) == 1.0
    assert value("multiple_choice", prediction, "D") == 0.0


@pytest.mark.parametrize("prediction", ["B", "(B)", "the correct answer is (B)", "The correct answer is (E)", ""])
def test_multiple_choice_without_an_answer_is_wrong(prediction: str) -> None:
    assert all(value("multiple_choice", prediction, letter) == 0.0 for letter in "ABCD")


def brute_lcs(first: str, second: str) -> int:
    if not first or not second:
        return 0
    if first[-1] == second[-1]:
        return 1 + brute_lcs(first[:-1], second[:-1])
    return max(brute_lcs(first[:-1], second), brute_lcs(first, second[:-1]))


def brute_levenshtein(first: str, second: str) -> int:
    if not first or not second:
        return len(first) + len(second)
    if first[-1] == second[-1]:
        return brute_levenshtein(first[:-1], second[:-1])
    return 1 + min(
        brute_levenshtein(first[:-1], second),
        brute_levenshtein(first, second[:-1]),
        brute_levenshtein(first[:-1], second[:-1]),
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("", ""),
        ("", "ab"),
        ("ab", ""),
        ("kitten", "sitting"),
        ("abcbd", "bdcab"),
        ("aaa", "aa"),
        ("xy", "yx"),
        ("é", "e"),
    ],
)
def test_alignment_against_plain_recursion(first: str, second: str) -> None:
    assert lcs_length(first, second) == brute_lcs(first, second)
    assert levenshtein(first, second) == brute_levenshtein(first, second)
    assert lcs_table(first, second).shape == (len(first) + 1, len(second) + 1)


def test_indel_similarity_of_nothing_is_one() -> None:
    assert indel_similarity("", "") == 1.0
    assert indel_similarity("", "a") == 0.0
