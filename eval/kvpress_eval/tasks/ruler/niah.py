"""Needles in a haystack: magic numbers or uuids of named things, hidden in essays, in noise, or among other needles."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from kvpress_eval.prompts import load_prompts
from kvpress_eval.sample import Sample
from kvpress_eval.tasks.base import Request
from kvpress_eval.tasks.ruler.fit import Draft
from kvpress_eval.tasks.ruler.sources import Essays, words
from kvpress_eval.tasks.ruler.task import N_SAMPLES, RulerTask, generator, percent_depth
from kvpress_eval.tasks.ruler.variants import Variant

Kind = Literal["words", "numbers", "uuids"]
#: depths in percent at which needles are put between the sentences of the essays: round(linspace(0, 100, 40))
DEPTHS = tuple(round(100 * step / 39) for step in range(40))


@dataclass(frozen=True)
class Setting:
    """One row of RULER's scripts/synthetic.yaml: haystack, kinds of key and value, and how many keys, values, queries."""

    haystack: Literal["noise", "essay", "needle"]
    key: Kind = "words"
    value: Kind = "numbers"
    n_keys: int = 1
    n_values: int = 1
    n_queries: int = 1


SETTINGS = {
    "niah_single_1": Setting("noise"),
    "niah_single_2": Setting("essay"),
    "niah_single_3": Setting("essay", value="uuids"),
    "niah_multikey_1": Setting("essay", n_keys=4),
    "niah_multikey_2": Setting("needle"),
    "niah_multikey_3": Setting("needle", key="uuids", value="uuids"),
    "niah_multivalue": Setting("essay", n_values=4),
    "niah_multiquery": Setting("essay", n_keys=4, n_queries=4),
}


class Niah(RulerTask):
    """The eight needle tasks.

    The essays begin with the same words in every sample; keys, values and depths are the sample's own. A word key is an
    adjective and a noun of wonderwords, drawn one by one (the official code draws from the list of all pairs).
    """

    def __init__(self, variant: Variant, task: str) -> None:
        super().__init__(variant, task, "niah")
        self.setting = SETTINGS[task]
        self.description = f"needles in {self.setting.haystack}s: {self.setting.value} of {self.setting.key}"
        if self.setting.haystack == "essay":
            self.caveat = "all samples share one haystack text, so they are less independent than their number says"

    def increment(self, length: int) -> int:
        if self.setting.haystack == "essay":
            return 500
        return 25 if length >= 4096 else 5

    def drafts(self, request: Request) -> tuple[int, Callable[[int], Draft]]:
        nouns, adjectives = words(request.data, "noun"), words(request.data, "adjective")
        essays = Essays(request.data) if self.setting.haystack == "essay" else None

        def draw(kind: Kind, rng: random.Random) -> str:
            if kind == "numbers":
                return str(rng.randint(1_000_000, 9_999_999))
            if kind == "uuids":
                return str(uuid.UUID(int=rng.getrandbits(128), version=4))
            return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"

        return N_SAMPLES, lambda index: _Drawn(self, request, index, draw, essays).draft()


class _Drawn:
    """All of one sample but the size of its haystack."""

    def __init__(
        self,
        task: Niah,
        request: Request,
        index: int,
        draw: Callable[[Kind, random.Random], str],
        essays: Essays | None,
    ) -> None:
        self.task, self.request, self.index, self.essays = task, request, index, essays
        self._draw = draw
        setting = task.setting
        rng = generator(request, task.task, index)
        keys: list[str] = []
        while len(keys) < setting.n_keys:
            key = draw(setting.key, rng)
            if key not in keys:
                keys.append(key)
        self.keys = frozenset(keys)
        values = {key: [draw(setting.value, rng) for _ in range(setting.n_values)] for key in keys}
        lines = {(key, value): self._line(key, value) for key in keys for value in values[key]}
        self.needles = task.variant.shuffled(list(lines.values()), request, rng.getrandbits(64))
        self.queries = rng.sample(keys, setting.n_queries)
        self.answers = tuple(value for key in self.queries for value in values[key])
        self.evidence = tuple(lines[key, value] for key in self.queries for value in values[key])
        self.depths = sorted(rng.sample(DEPTHS, len(self.needles)))
        self._position_seed, self._filler_seed = rng.getrandbits(64), rng.getrandbits(64)

    def draft(self) -> Draft:
        if self.essays is not None:
            return Draft(self._in_essays, smallest=50)
        if self.task.setting.haystack == "noise":
            noise = str(load_prompts("ruler")["noise"])
            return Draft(lambda size: self._among([noise] * size), smallest=5)
        return Draft(lambda size: self._among(self._distractors(size)), smallest=5, closer=self._longer_distractors)

    def _line(self, key: str, value: str) -> str:
        template = str(load_prompts("ruler")["needle"])
        return template.format(type_needle_v=self.task.setting.value, key=key, value=value)

    def _in_essays(self, n_words: int) -> Sample:
        assert self.essays is not None
        sentences = self.essays.sentences(n_words)
        borders = [0, *(int(len(sentences) * depth / 100) for depth in self.depths), len(sentences)]
        pieces: list[str] = []
        for position, needle in enumerate([*self.needles, None]):
            pieces.append(" ".join(sentences[borders[position] : borders[position + 1]]))
            if needle is not None:
                pieces.append(needle)
        return self._sample(" ".join(pieces))

    def _among(self, lines: list[str]) -> Sample:
        """The needles between other lines, at distinct random places."""
        places = random.Random(self._position_seed).sample(range(len(lines)), len(self.needles))
        for place, needle in zip(sorted(places, reverse=True), self.needles, strict=True):
            lines.insert(place, needle)
        return self._sample("\n".join(lines))

    def _distractors(self, n_lines: int) -> list[str]:
        rng = random.Random(self._filler_seed)
        return [self._distractor(rng) for _ in range(n_lines)]

    def _distractor(self, rng: random.Random) -> str:
        """A needle of another key; a needle of the same key would make the question ambiguous."""
        setting = self.task.setting
        while (key := self._draw(setting.key, rng)) in self.keys:
            pass
        return self._line(key, self._draw(setting.value, rng))

    def _longer_distractors(self, n_lines: int, missing: int) -> Iterator[Sample]:
        """As many distractors, some redrawn for longer ones: a uuid line is too coarse a step at short lengths."""

        def count(line: str) -> int:
            return len(self.request.tokenizer(line, add_special_tokens=False)["input_ids"])

        lines, rng = self._distractors(n_lines), random.Random(self._filler_seed + 1)
        counts = [count(line) for line in lines]
        # enough for the slack of the budget, and no more than what is missing
        gained, wanted = 0, max(missing - int(0.015 * (self.request.length or 0)), 1)
        for place in [*range(n_lines)] * 8:
            other = self._distractor(rng)
            more = count(other) - counts[place]
            if 0 < more <= missing - gained:
                lines[place], counts[place], gained = other, counts[place] + more, gained + more
            if gained >= wanted:
                yield self._among(list(lines))
                wanted = gained + 1

    def _sample(self, context: str) -> Sample:
        setting, task = self.task.setting, self.task
        query = self.queries[0]
        if len(self.queries) > 1:
            query = f"{', '.join(self.queries[:-1])}, and {self.queries[-1]}"
        before, behind = str(task.frame["template"]).split("{context}")
        prefix, value = task.answer_prefix(), str(setting.value)
        if setting.n_queries * setting.n_values == 1:
            before, behind, prefix = singular(before), singular(behind), singular(prefix)
            value = value.removesuffix("s")
        return Sample(
            id=str(self.index),
            cluster=str(self.index),
            lead=before.format(type_needle_v=value),
            context=context,
            question=behind.format(type_needle_v=value, query=query),
            answer_prefix=prefix.format(type_needle_v=value, query=query),
            answers=self.answers,
            metric=task.metric,
            max_new_tokens=int(task.frame["max_new_tokens"]),
            evidence=self.evidence,
            meta={
                "length": self.request.length,
                "depths": [percent_depth(context, line) for line in self.evidence],
            },
        )


def singular(text: str) -> str:
    """A frame for one value: RULER's four replacements, in its order."""
    for plural, one in load_prompts("ruler")["singular"]:
        text = text.replace(plural, one)
    return text
