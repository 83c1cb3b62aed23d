"""RULER's cwe: frequencies 30/3 (6/1 below 4096 tokens), the worked example, and the numbered list."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from ruler_support import samples, word_list

from kvpress.errors import InputError

LEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most "
    "often.\n"
)
QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
PREFIX = " Answer: The top 10 words that appear most often in the list are:"


def listed(text):
    """Words of a numbered list, whose numbers must be 1, 2, 3, ..."""
    assert re.fullmatch(r"\d+\. \S+( \d+\. \S+)*", text)
    entries = re.findall(r"(\d+)\. (\S+)", text)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    return [word for _, word in entries]


def frequencies(words, common):
    counted = Counter(words)
    assert set(common) == {word for word, _ in counted.most_common(10)}
    return Counter(counted.values())


@pytest.mark.parametrize(
    ("length", "common", "uncommon", "example_words", "example_common", "example_uncommon"),
    [(2048, 6, 1, 20, 3, 1), (4096, 30, 3, 40, 10, 3)],
)
@pytest.mark.parametrize("family", ["ruler-2024", "ruler-2026", "ruler-posfix"])
def test_frequencies(ruler_data, family, length, common, uncommon, example_words, example_common, example_uncommon):
    for sample in samples(ruler_data, f"{family}/cwe", length, 2):
        assert (sample.lead, sample.question, sample.answer_prefix) == (LEAD, QUESTION, PREFIX)
        example, task = sample.context.split(f"\n{LEAD}")
        counts = frequencies(listed(task), sample.answers)
        assert counts == {common: 10, uncommon: counts[uncommon]}
        assert counts[uncommon] >= 1
        shown, answered = example.split(QUESTION + PREFIX)
        gap = "" if family == "ruler-2024" else " "
        assert answered.startswith(f"{gap}1. ")
        told = listed(answered.removeprefix(gap))
        assert len(told) == 10
        assert frequencies(listed(shown), told) == {example_common: 10, example_uncommon: example_words - 10}
        assert set(listed(task)) <= set(word_list())
        assert (sample.evidence, sample.meta["depths"], sample.max_new_tokens) == ((), [], 120)


def test_one_permutation_or_one_for_each_sample(ruler_data):
    def orders(family):
        """Ranks of the words by first place, for samples whose lists are equally long."""
        found: dict[int, set[tuple[int, ...]]] = {}
        for sample in samples(ruler_data, f"{family}/cwe", 2048, 8):
            words = listed(sample.context.split(f"\n{LEAD}")[1])
            places = tuple(i for i, word in enumerate(words) if word in sample.answers)
            found.setdefault(len(words), set()).add(places)
        return max(found.values(), key=len), sum(map(len, found.values()))

    # which places are a common word's is decided by the shuffle alone
    for family in ("ruler-2024", "ruler-2026"):
        assert len(orders(family)[0]) == 1
    assert orders("ruler-posfix")[1] == 8


def test_word_lists_have_an_end(ruler_data):
    with pytest.raises(InputError, match=r"ruler-2026/cwe has material for [\d,]+ tokens at most"):
        samples(ruler_data, "ruler-2026/cwe", 65_536, 1)
