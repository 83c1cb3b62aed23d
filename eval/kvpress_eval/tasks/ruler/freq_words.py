"""Frequent words: which three coded words stand most often in a text whose word counts fall with the square of the rank?"""

from __future__ import annotations

import math
import string
from collections.abc import Callable

from kvpress_eval.sample import Sample
from kvpress_eval.tasks.base import Request
from kvpress_eval.tasks.ruler.fit import Draft
from kvpress_eval.tasks.ruler.task import N_SAMPLES, RulerTask, generator
from kvpress_eval.tasks.ruler.variants import Variant

WORD_LETTERS = 6
#: Riemann's zeta at the published exponent 2.0: the shares k^-2 / ZETA sum to one
ZETA = math.pi**2 / 6
NOISE = "..."
N_ANSWERS = 3
#: of the shortest texts, whose words of higher rank stand in them less than once
LEAST_VOCABULARY = 8


class FreqWords(RulerTask):
    """The task "fwe". Rank 1 is noise ("..."), ranks 2 to 4 are asked for."""

    def __init__(self, variant: Variant) -> None:
        super().__init__(variant, "fwe", "freq_words")
        self.description = "the three most frequent coded words, Zipf-distributed with exponent 2"

    def increment(self, length: int) -> int:
        return max(length // 32, 1)

    def drafts(self, request: Request) -> tuple[int, Callable[[int], Draft]]:
        n_vocabulary = max((request.length or 0) // 50, LEAST_VOCABULARY)

        def draft(index: int) -> Draft:
            rng = generator(request, self.task, index)
            vocabulary = [NOISE]
            while len(vocabulary) < n_vocabulary:
                word = "".join(rng.choices(string.ascii_lowercase, k=WORD_LETTERS))
                if word not in vocabulary:
                    vocabulary.append(word)
            order = rng.getrandbits(64)
            # from 100 words on, rank 4 has more of them than rank 5
            return Draft(lambda size: self._sample(request, index, vocabulary, size, order), smallest=100)

        return N_SAMPLES, draft

    def _sample(self, request: Request, index: int, vocabulary: list[str], n_words: int, seed: int) -> Sample:
        before, behind, prefix = self.around_context()
        text = [
            word for word, count in zip(vocabulary, counts(n_words, len(vocabulary)), strict=True) for _ in range(count)
        ]
        return Sample(
            id=str(index),
            cluster=str(index),
            lead=before,
            context=" ".join(self.variant.shuffled(text, request, seed)),
            question=behind,
            answer_prefix=prefix,
            answers=tuple(vocabulary[1 : 1 + N_ANSWERS]),
            metric=self.metric,
            max_new_tokens=int(self.frame["max_new_tokens"]),
            meta={"length": request.length, "depths": []},
        )


def counts(n_words: int, n_vocabulary: int) -> list[int]:
    """How often the words of rank 1, 2, ... stand in a text of about n_words: int(n_words · rank^-2 / ζ(2))."""
    return [int(n_words * rank**-2.0 / ZETA) for rank in range(1, n_vocabulary + 1)]
