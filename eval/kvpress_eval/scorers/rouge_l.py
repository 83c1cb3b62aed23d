"""LongBench's summarization metric: ROUGE-L as the package `rouge` 1.0.1 computes it, without its recursion.

It is a summary-level ROUGE-L over sets of word types, not the ROUGE-L of `rouge_score`: both texts are split at ".",
for each pair of a reference and a hypothesis sentence the words of their longest common subsequence join one set, and
the size of that set is divided by the numbers of distinct words. The package rebuilds the subsequence recursively and
fails on long sentences, which LongBench turns into a score of 0; the definition here has no such limit.
Source: rouge 1.0.1, rouge/rouge_score.py `rouge_l_summary_level`, called from THUDM/LongBench 2e00731,
LongBench/metrics.py.
"""

from __future__ import annotations

from kvpress_eval.sample import Sample
from kvpress_eval.scorers.alignment import lcs_items
from kvpress_eval.scorers.base import Score, scorer
from kvpress_eval.scorers.chinese import chinese_words
from kvpress_eval.scorers.longbench import OFFICIAL, best_reference, first_line

VERSION = f"{OFFICIAL}-rouge-1.0.1-loop"


@scorer("rouge_l", version=VERSION)
def rouge_l(prediction: str, sample: Sample) -> Score:
    """ROUGE-L F of the best reference."""
    return best_reference(rouge_l_f, prediction, sample)


@scorer("rouge_l-firstline", version=VERSION)
def rouge_l_first_line(prediction: str, sample: Sample) -> Score:
    """`rouge_l` of the first line, for samsum."""
    return rouge_l(first_line(prediction), sample)


@scorer("rouge_l_zh", version=VERSION)
def rouge_l_zh(prediction: str, sample: Sample) -> Score:
    """ROUGE-L F of jieba's words, joined by spaces; best reference."""
    return best_reference(
        lambda guess, answer: rouge_l_f(" ".join(chinese_words(guess)), " ".join(chinese_words(answer))),
        prediction,
        sample,
    )


def rouge_l_f(prediction: str, reference: str) -> float:
    """ROUGE-L F in [0, 1 - 5e-9]; 0 if one of the texts has nothing but full stops."""
    hypothesis, target = _sentences(prediction), _sentences(reference)
    if not hypothesis or not target:
        return 0.0
    matched: set[str] = set()
    for target_words in target:
        for hypothesis_words in hypothesis:
            matched.update(lcs_items(target_words, hypothesis_words))
    recall = len(matched) / len(set().union(*target))
    precision = len(matched) / len(set().union(*hypothesis))
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _sentences(text: str) -> list[tuple[str, ...]]:
    """The distinct sentences as words. A blank sentence is there, with one empty word, as in the package."""
    sentences = [" ".join(sentence.split()) for sentence in text.split(".") if sentence]
    return list(dict.fromkeys(tuple(sentence.split(" ")) for sentence in sentences))
