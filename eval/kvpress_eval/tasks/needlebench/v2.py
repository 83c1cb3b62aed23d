"""NeedleBench v2 as its code generates it (`needlebench-v2`), and with its flaws mended (`needlebench-v2-fixed`).

Lengths are cl100k tokens, and a buffer is taken off them for the frame and the answer. The buffer belongs to the set: 500
for the English sets 4k and 8k (families `needlebench-v2-8k*`), 3000 for 32k and above, 200 for Chinese (`*-zh*`).

Mended: which needles m_rt uses depends on the seed alone (the original draws them with an unseeded generator, anew for
each length; here its draw depends on seed and length and is recorded), lengths that leave no haystack are refused, and the
facts of m_rs are as far apart as they are meant to be (the original counts the facts before them twice).
"""

from __future__ import annotations

import json
import random
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tiktoken

from kvpress.errors import InputError
from kvpress_eval.data.needlebench import GET, SHA256
from kvpress_eval.prompts import load_prompts
from kvpress_eval.sample import Sample
from kvpress_eval.tasks.base import Request, Task, register
from kvpress_eval.tasks.needlebench.grid import diagonal, fill, halves
from kvpress_eval.tasks.needlebench.haystack import Essays, cl100k, insert
from kvpress_eval.tasks.needlebench.kinship import draw_chain
from kvpress_eval.tasks.needlebench.needles import Needle, combined_question, draw_distinct, read_needles

PROTOCOL: dict[str, Any] = load_prompts("needlebench")


@dataclass(frozen=True)
class Protocol:
    """A family: its language, the tokens that are left free for frame and answer, and whether flaws are mended."""

    family: str
    language: str
    buffer: int
    fixed: bool


PROTOCOLS = [
    Protocol(f"needlebench-v2{name}{'-fixed' if fixed else ''}", language, buffer, fixed)
    for name, language, buffer in (("", "English", 3000), ("-8k", "English", 500), ("-zh", "Chinese", 200))
    for fixed in (False, True)
]
_ESSAYS = {"English": "PaulGrahamEssays.jsonl", "Chinese": "zh_finance.jsonl"}


@dataclass
class Sources:
    """What the samples of one request are made of; files are read when they are first needed."""

    protocol: Protocol
    request: Request

    def _path(self, name: str) -> Any:
        return self.request.data.path(f"needlebench/{name}", sha256=SHA256[name], get=GET)

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        return cl100k(self.request.data)

    @cached_property
    def essays(self) -> Essays:
        return Essays(self._path(_ESSAYS[self.protocol.language]), self.encoding)

    @cached_property
    def needles(self) -> list[Needle]:
        return read_needles(self._path("needles.jsonl"), self.protocol.language)

    @cached_property
    def names(self) -> list[str]:
        names: dict[str, str] = json.loads(self._path("names.json").read_text(encoding="utf-8"))
        return names[self.protocol.language].split(",")

    @property
    def length(self) -> int:
        if self.request.length is None:
            raise InputError(f"{self.protocol.family} needs a length in cl100k tokens, for example 8000")
        return self.request.length


class V2Task(Task):
    """A task with a haystack. Subclasses say what is hidden in it and where."""

    kind: str
    metric: str
    needs_length = True

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.family = protocol.family
        self.name = f"{protocol.family}/{self.kind}"
        self.caveat = f"length in cl100k tokens, {protocol.buffer:,} of them left free"
        if not protocol.fixed:
            self.caveat += "; lengths up to that have an empty haystack (meta haystack_tokens), as in the original"

    @property
    def repeats(self) -> int:
        return int(PROTOCOL["repeats"][self.kind])

    @abstractmethod
    def make(self, sources: Sources, index: int) -> Sample:
        """The sample of an index."""

    @abstractmethod
    def available(self) -> int:
        """How many samples there are at one length."""

    def samples(self, request: Request) -> Iterator[Sample]:
        sources = Sources(self.protocol, request)
        for index in request.indices(self.available()):
            yield self.make(sources, index)

    def hide(self, sources: Sources, repeat: int, pieces: Sequence[str], depths: Sequence[float]) -> tuple[str, int]:
        """Context with pieces at depths in percent of the haystack, and the haystack's tokens."""
        tokens = [sources.encoding.encode_ordinary(piece) for piece in pieces]
        n = sources.length - self.protocol.buffer - sum(map(len, tokens))
        if n <= 0 and self.protocol.fixed:
            raise InputError(
                f"{self.name} leaves {self.protocol.buffer:,} tokens free, so a length of {sources.length:,} has no room for "
                f"a haystack: ask for more"
            )
        haystack = sources.essays.tokens(repeat, max(n, 0))
        places = self.places(len(haystack), [len(piece) for piece in tokens], depths)
        return sources.encoding.decode(insert(haystack, tokens, places)), len(haystack)

    def places(self, n: int, lengths: Sequence[int], depths: Sequence[float]) -> list[int]:
        """Where the pieces go, each position counting the pieces before it."""
        return [int(n * (depth / 100)) + sum(lengths[:i]) for i, depth in enumerate(depths)]

    def sample(self, sources: Sources, context: str, values: dict[str, Any], **fields: Any) -> Sample:
        """A sample in this task's frame."""
        lead, question = halves(fill(PROTOCOL[self.protocol.language][self.kind], **values))
        return Sample(
            lead=lead,
            context=context,
            question=question,
            answer_prefix="",
            metric=self.metric,
            max_new_tokens=PROTOCOL["max_new_tokens"][self.kind],
            **fields,
        )


class SingleRetrieval(V2Task):
    """S-RT. The ten repeats (needle, order of the essays) are the same in every cell of length and depth."""

    kind, metric, description = "s_rt", "needle_keyword", "one needle at one of eleven depths"

    def available(self) -> int:
        return len(PROTOCOL["depths"]) * self.repeats

    def make(self, sources: Sources, index: int) -> Sample:
        repeat, cell = divmod(index, len(PROTOCOL["depths"]))
        depth = PROTOCOL["depths"][cell]
        needle = random.Random(repeat).choice(sources.needles)
        context, n = self.hide(sources, repeat, [f"\n{needle.text}\n"], [depth])
        return self.sample(
            sources,
            context,
            {"question": needle.question},
            id=f"repeat-{repeat}-depth-{depth}",
            cluster=f"repeat-{repeat}",
            answers=(needle.arg2,),
            evidence=(needle.text,),
            meta={
                "depth": depth,
                "length": sources.length,
                "repeat": repeat,
                "needles": [needle.id],
                "haystack_tokens": n,
            },
        )


class MultiRetrieval(V2Task):
    """M-RT. All repeats share eleven needles; each shuffles them over the depths and has its own order of the essays."""

    kind, metric, description = "m_rt", "needle_parallel", "eleven needles at depths 0, 10, ..., 100, one question"

    def available(self) -> int:
        return self.repeats

    def make(self, sources: Sources, index: int) -> Sample:
        depths = list(PROTOCOL["depths"])
        draw = f"needles:{sources.request.seed}" + ("" if self.protocol.fixed else f":{sources.length}")
        needles = draw_distinct(sources.needles, len(depths), random.Random(draw))
        random.Random(index).shuffle(needles)
        context, n = self.hide(sources, index, [f"\n{needle.text}\n" for needle in needles], depths)
        ids = [needle.id for needle in needles]
        return self.sample(
            sources,
            context,
            {"question": combined_question(needles, self.protocol.language)},
            id=f"repeat-{index}",
            cluster=f"repeat-{index}",
            answers=tuple(needle.arg2 for needle in needles),
            evidence=tuple(needle.text for needle in needles),
            meta={"depths": depths, "length": sources.length, "repeat": index, "needles": ids, "haystack_tokens": n},
        )


class MultiReasoning(V2Task):
    """M-RS. `depth` is that of the first fact; the others follow at steps of a tenth of the haystack."""

    kind, metric, description = "m_rs", "boxed", "two to five linked facts, one question that needs all of them"

    def available(self) -> int:
        return len(PROTOCOL["depths"]) * len(PROTOCOL["m_rs_needles"]) * self.repeats

    def make(self, sources: Sources, index: int) -> Sample:
        cells = diagonal(PROTOCOL["depths"], PROTOCOL["m_rs_needles"])
        repeat, cell = divmod(index, len(cells))
        depth, n_facts = cells[cell]
        chain = draw_chain(sources.names, n_facts, random.Random(repeat))
        context, n = self.hide(sources, repeat, [f"\n{fact}\n" for fact in chain.facts], [depth] * n_facts)
        question = fill(PROTOCOL[self.protocol.language]["m_rs_question"], youngest=chain.youngest)
        return self.sample(
            sources,
            context,
            {"question": question, "youngest": chain.youngest},
            id=f"repeat-{repeat}-depth-{depth}-facts-{n_facts}",
            cluster=f"repeat-{repeat}",
            answers=(chain.eldest,),
            reference=f"\\boxed{{{chain.eldest}}}",
            evidence=chain.facts,
            meta={"depth": depth, "facts": n_facts, "length": sources.length, "repeat": repeat, "haystack_tokens": n},
        )

    def places(self, n: int, lengths: Sequence[int], depths: Sequence[float]) -> list[int]:
        """multi.py: each position counts the pieces before it, is capped at the end, and (unless mended) gets them added
        once more."""
        places = [int(n * (depths[0] / 100))]
        for i in range(1, len(lengths)):
            wanted = int(places[-1] + lengths[i - 1] + n * (PROTOCOL["m_rs_step"] / 100))
            places.append(min(wanted, n + sum(lengths[:i])))
        if self.protocol.fixed:
            return places
        return [place + sum(lengths[:i]) for i, place in enumerate(places)]


for _protocol in PROTOCOLS:
    register(SingleRetrieval(_protocol))
    register(MultiRetrieval(_protocol))
    if _protocol.language == "English":
        register(MultiReasoning(_protocol))
