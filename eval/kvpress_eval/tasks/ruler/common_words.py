"""Common words: which ten words of a numbered list are repeated most often? A worked example comes first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvpress_eval.sample import Sample
from kvpress_eval.tasks.base import Request
from kvpress_eval.tasks.ruler.fit import Draft
from kvpress_eval.tasks.ruler.sources import words
from kvpress_eval.tasks.ruler.task import N_SAMPLES, RulerTask, generator
from kvpress_eval.tasks.ruler.variants import Variant

N_COMMON = 10


@dataclass(frozen=True)
class Repeats:
    """How often a common and an uncommon word stand in a list."""

    common: int
    uncommon: int


@dataclass(frozen=True)
class Setting:
    """Of one range of lengths: repeats in the list, and words and repeats in the example."""

    repeats: Repeats
    example_words: int
    example_repeats: Repeats


LONG = Setting(Repeats(30, 3), 40, Repeats(10, 3))
SHORT = Setting(Repeats(6, 1), 20, Repeats(3, 1))  # below 4096 tokens


class CommonWords(RulerTask):
    """The task "cwe". Words are the nouns, adjectives and verbs of wonderwords.

    The official code goes over to a longer word list beyond about 145 thousand tokens; this one refuses such lengths.
    """

    caveat = "many answers are short words, which any longer text contains by chance"

    def __init__(self, variant: Variant) -> None:
        super().__init__(variant, "cwe", "common_words")
        self.description = "the ten most common words of a numbered list"

    def increment(self, length: int) -> int:
        return 10

    def drafts(self, request: Request) -> tuple[int, Callable[[int], Draft]]:
        kinds = ("noun", "adjective", "verb")
        vocabulary = sorted({word for kind in kinds for word in words(request.data, kind)})
        setting = LONG if (request.length or 0) >= 4096 else SHORT

        def draft(index: int) -> Draft:
            rng = generator(request, self.task, index)
            order, example_order = rng.getrandbits(64), rng.getrandbits(64)
            example_words = rng.sample(vocabulary, setting.example_words)
            drawn = rng.sample(vocabulary, len(vocabulary))

            def at(n_words: int) -> Sample:
                numbered = self._numbered(request, drawn[:n_words], setting.repeats, order)
                example = self._numbered(request, example_words, setting.example_repeats, example_order)
                return self._sample(request, index, numbered, drawn[:N_COMMON], example, example_words[:N_COMMON])

            return Draft(at, smallest=N_COMMON + 1, largest=len(vocabulary))

        return N_SAMPLES, draft

    def _numbered(self, request: Request, drawn: list[str], repeats: Repeats, seed: int) -> str:
        """The shuffled, numbered list; the first N_COMMON words are the common ones."""
        listed = drawn[:N_COMMON] * repeats.common + drawn[N_COMMON:] * repeats.uncommon
        return _enumerated(self.variant.shuffled(listed, request, seed))

    def _sample(
        self, request: Request, index: int, context: str, answers: list[str], example: str, example_answers: list[str]
    ) -> Sample:
        before, behind, prefix = self.around_context()
        gap = "" if self.variant.old_wording else " "
        return Sample(
            id=str(index),
            cluster=str(index),
            lead=before,
            context=f"{example}{behind}{prefix}{gap}{_enumerated(example_answers)}\n{before}{context}",
            question=behind,
            answer_prefix=prefix,
            answers=tuple(answers),
            metric=self.metric,
            max_new_tokens=int(self.frame["max_new_tokens"]),
            meta={"length": request.length, "depths": []},
        )


def _enumerated(items: list[str]) -> str:
    return " ".join(f"{number}. {item}" for number, item in enumerate(items, start=1))
