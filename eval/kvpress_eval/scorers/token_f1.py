"""LongBench's question answering metric: F1 of the normalized words, as bags.

Source: THUDM/LongBench 2e00731, LongBench/metrics.py, after the SQuAD evaluation script.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from kvpress_eval.sample import Sample
from kvpress_eval.scorers.base import Score, scorer
from kvpress_eval.scorers.chinese import chinese_words
from kvpress_eval.scorers.longbench import OFFICIAL, best_reference, first_line

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
# as in the original, so without the opening bracket that pairs with 》
_CHINESE_PUNCTUATION = str.maketrans(
    "",
    "",
    string.punctuation
    + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏.",
)


@scorer("qa_f1", version=OFFICIAL)
def qa_f1(prediction: str, sample: Sample) -> Score:
    """F1 of the words, lower-cased, without ASCII punctuation and articles; best reference."""
    return best_reference(lambda guess, answer: f1(english_words(guess), english_words(answer)), prediction, sample)


@scorer("qa_f1-firstline", version=OFFICIAL)
def qa_f1_first_line(prediction: str, sample: Sample) -> Score:
    """`qa_f1` of the first line, for triviaqa."""
    return qa_f1(first_line(prediction), sample)


@scorer("qa_f1_zh", version=OFFICIAL)
def qa_f1_zh(prediction: str, sample: Sample) -> Score:
    """F1 of jieba's words, lower-cased, without Chinese and ASCII punctuation; best reference."""
    return best_reference(lambda guess, answer: f1(_chinese_words(guess), _chinese_words(answer)), prediction, sample)


def f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of two bags of words, in [0, 1]; 0 if they share none."""
    shared = (Counter(prediction) & Counter(reference)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(reference)
    return 2 * precision * recall / (precision + recall)


def english_words(text: str) -> list[str]:
    """Punctuation goes before articles do, so "a-b" becomes "ab" and "the." becomes nothing."""
    return _ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split()


def _chinese_words(text: str) -> list[str]:
    normalized = ("".join(word.lower().translate(_CHINESE_PUNCTUATION).split()) for word in chinese_words(text))
    return [word for word in normalized if word]
