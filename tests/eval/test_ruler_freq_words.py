"""RULER's fwe: frequencies that fall with the square of the rank, noise at rank 1, answers at ranks 2 to 4."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from ruler_support import samples

#: sum of rank^-2 over all ranks, added up rather than looked up
ZETA_2 = sum(rank**-2 for rank in range(1, 2_000_000)) + 1 / 2_000_000


@pytest.mark.parametrize("family", ["ruler-2024", "ruler-2026", "ruler-posfix"])
@pytest.mark.parametrize("length", [2048, 4096])
def test_counts_follow_the_published_formula(ruler_data, family, length):
    for sample in samples(ruler_data, f"{family}/fwe", length, 2):
        ranked = Counter(sample.context.split(" ")).most_common()
        assert ranked[0][0] == "..."
        assert tuple(word for word, _ in ranked[1:4]) == sample.answers
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
        counts = [count for _, count in ranked]
        assert counts[3] > counts[4]
        around = int(counts[0] * ZETA_2)
        formula = {
            n: [c for c in (int(n * rank**-2 / ZETA_2) for rank in range(1, length // 50 + 1)) if c]
            for n in range(around - 1, around + 3)
        }
        assert counts in formula.values()
        assert (sample.metric, sample.max_new_tokens, sample.evidence) == ("ruler_all", 50, ())


def test_frame(ruler_data):
    (sample,) = samples(ruler_data, "ruler-2026/fwe", 2048, 1)
    assert sample.text + sample.answer_prefix == (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
        f"coded words. {sample.context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
        "three most frequently appeared words in the above coded text? Answer: According to the coded text above, the three "
        "most frequently appeared words are:"
    )


def test_words_are_new_in_every_sample(ruler_data):
    answers = [word for sample in samples(ruler_data, "ruler-2026/fwe", 2048, 5) for word in sample.answers]
    assert len(set(answers)) == 15
