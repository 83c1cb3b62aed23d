"""`needlebench-recipe`: the tasks of NeedleBench with needles of our own, in the evaluated model's own tokens.

`length` is that of prompt and answer together. Each repeat draws its own needles and its own stretch of the essays, so
repeats are independent of each other. A needle goes to the first word border at or behind its depth, which is counted in
tokens of the haystack. Scores are not comparable with published NeedleBench ones.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from kvpress.errors import InputError
from kvpress_eval.prompt import render
from kvpress_eval.prompts import load_prompts
from kvpress_eval.sample import Sample
from kvpress_eval.tasks.base import Request, Task, register
from kvpress_eval.tasks.needlebench.atc import ask, cells
from kvpress_eval.tasks.needlebench.grid import diagonal, fill, halves
from kvpress_eval.tasks.needlebench.kinship import draw_chain, recipe_names
from kvpress_eval.tasks.needlebench.needles import combined_question, draw_distinct, recipe_needles
from kvpress_eval.tasks.needlebench.recipe_haystack import Essays, Haystack

PROTOCOL: dict[str, Any] = load_prompts("needlebench")
REPEATS: dict[str, int] = load_prompts("needlebench_recipe")["repeats"]
FAMILY = "needlebench-recipe"
#: tokens; less is no haystack
MIN_HAYSTACK = 64


class RecipeTask(Task):
    """A task with a haystack. Subclasses draw what is hidden and ask for it."""

    kind: str
    family = FAMILY
    needs_length = True
    caveat = "needles of our own, counted in the model's tokens: not comparable with published NeedleBench scores"

    def __init__(self) -> None:
        self.name = f"{FAMILY}/{self.kind}"

    @abstractmethod
    def plan(self) -> list[tuple[int, dict[str, Any]]]:
        """(repeat, what varies within a repeat) of every sample, in order."""

    @abstractmethod
    def draw(self, rng: random.Random, repeat: int, cell: dict[str, Any]) -> tuple[Sample, list[str], list[float]]:
        """A sample without its context, the pieces to hide, and their depths."""

    def samples(self, request: Request) -> Iterator[Sample]:
        essays = Essays.load(request.data)
        length = checked_length(request)
        plan = self.plan()
        for index in request.indices(len(plan)):
            repeat, cell = plan[index]
            rng = random.Random(f"{self.name}:{request.seed}:{repeat}")
            haystack = Haystack(essays, rng.choice(essays.starts), request.tokenizer)
            sample, pieces, depths = self.draw(rng, repeat, cell)
            yield self.fitted(request, length, haystack, sample, pieces, depths)

    def fitted(
        self,
        request: Request,
        length: int,
        haystack: Haystack,
        sample: Sample,
        pieces: list[str],
        depths: list[float],
    ) -> Sample:
        """The sample with as long a haystack as there is room for, beside the answer."""
        room = (
            length
            - sample.max_new_tokens
            - n_prompt(request, with_context(sample, "".join(f"\n{p}\n" for p in pieces)))
        )
        n = room
        while True:
            if n < MIN_HAYSTACK:
                raise InputError(
                    f"{self.name} needs a length of {length - n + MIN_HAYSTACK:,} tokens or more with this tokenizer, not {length:,}"
                )
            full = with_context(sample, haystack.hide(n, pieces, depths), length=length, haystack_tokens=n)
            over = n_prompt(request, full) + full.max_new_tokens - length
            if over <= 0:
                return full
            n -= over

    def blank(self, repeat: int, question: str, frame: dict[str, object] | None = None, **fields: Any) -> Sample:
        """A sample in this task's frame, still without a context."""
        lead, tail = halves(fill(PROTOCOL["English"][self.kind], question=question, **(frame or {})))
        limit = PROTOCOL["max_new_tokens"][self.kind]
        cluster = f"repeat-{repeat}"
        return Sample(
            cluster=cluster, lead=lead, context="", question=tail, answer_prefix="", max_new_tokens=limit, **fields
        )


def checked_length(request: Request) -> int:
    """The length that was asked for.

    Raises:
        InputError: there is none.
    """
    if request.length is None:
        raise InputError(f"{FAMILY} needs a length in tokens, for example 4096")
    return request.length


def n_prompt(request: Request, sample: Sample) -> int:
    """Tokens of the whole prompt, chat template included."""
    return len(render(request.tokenizer, sample, chat=request.chat).ids)


def with_context(sample: Sample, context: str, **meta: Any) -> Sample:
    """The sample around another context, with more said about it."""
    return Sample(**{**vars(sample), "context": context, "meta": {**sample.meta, **meta}})


class SingleRetrieval(RecipeTask):
    """S-RT: a repeat's needle at each of the eleven depths of the same text."""

    kind, description = "s_rt", "one needle of our own at one of eleven depths"

    def plan(self) -> list[tuple[int, dict[str, Any]]]:
        return [(repeat, {"depth": depth}) for repeat in range(REPEATS["s_rt"]) for depth in PROTOCOL["depths"]]

    def draw(self, rng: random.Random, repeat: int, cell: dict[str, Any]) -> tuple[Sample, list[str], list[float]]:
        needle = rng.choice(recipe_needles())
        sample = self.blank(
            repeat,
            needle.question,
            id=f"repeat-{repeat}-depth-{cell['depth']}",
            answers=(needle.arg2,),
            metric="needle_keyword",
            evidence=(needle.text,),
            meta={"depth": cell["depth"], "repeat": repeat, "needles": [needle.id]},
        )
        return sample, [needle.text], [cell["depth"]]


class MultiRetrieval(RecipeTask):
    """M-RT: eleven needles, one at each depth."""

    kind, description = "m_rt", "eleven needles of our own at depths 0, 10, ..., 100, one question"

    def plan(self) -> list[tuple[int, dict[str, Any]]]:
        return [(repeat, {}) for repeat in range(REPEATS["m_rt"])]

    def draw(self, rng: random.Random, repeat: int, cell: dict[str, Any]) -> tuple[Sample, list[str], list[float]]:
        depths = list(PROTOCOL["depths"])
        needles = draw_distinct(recipe_needles(), len(depths), rng)
        sample = self.blank(
            repeat,
            combined_question(needles, "English"),
            id=f"repeat-{repeat}",
            answers=tuple(needle.arg2 for needle in needles),
            metric="needle_parallel",
            evidence=tuple(needle.text for needle in needles),
            meta={"depths": depths, "repeat": repeat, "needles": [needle.id for needle in needles]},
        )
        return sample, [needle.text for needle in needles], depths


class MultiReasoning(RecipeTask):
    """M-RS: linked facts from a depth on, each a tenth of the haystack behind the last one, none behind its end."""

    kind, description = "m_rs", "two to five linked facts about invented people, one question that needs all of them"

    def plan(self) -> list[tuple[int, dict[str, Any]]]:
        grid = diagonal(PROTOCOL["depths"], PROTOCOL["m_rs_needles"])
        return [(repeat, {"depth": depth, "facts": n}) for repeat in range(REPEATS["m_rs"]) for depth, n in grid]

    def draw(self, rng: random.Random, repeat: int, cell: dict[str, Any]) -> tuple[Sample, list[str], list[float]]:
        depth, n_facts = cell["depth"], cell["facts"]
        chain = draw_chain(recipe_names(), n_facts, rng)
        sample = self.blank(
            repeat,
            fill(PROTOCOL["English"]["m_rs_question"], youngest=chain.youngest),
            {"youngest": chain.youngest},
            id=f"repeat-{repeat}-depth-{depth}-facts-{n_facts}",
            answers=(chain.eldest,),
            reference=f"\\boxed{{{chain.eldest}}}",
            metric="boxed",
            evidence=chain.facts,
            meta={"depth": depth, "facts": n_facts, "repeat": repeat},
        )
        depths = [min(depth + i * PROTOCOL["m_rs_step"], 100) for i in range(n_facts)]
        return sample, list(chain.facts), depths


class AncestralTrace(Task):
    """ATC with invented names, in the numbers of facts (2, 4, ..., 512) whose prompts and answers fit the length."""

    name, family, needs_length = f"{FAMILY}/atc", FAMILY, True
    description = "kinship chains of invented people, as long as the length allows, four types of question"
    caveat = RecipeTask.caveat

    def samples(self, request: Request) -> Iterator[Sample]:
        length = checked_length(request)
        counts: list[int] = []
        for n_facts in PROTOCOL["atc_needles"]:
            made = [self.make(request, *cell) for cell in cells([n_facts], REPEATS["atc"])]
            longest = max(n_prompt(request, sample) + sample.max_new_tokens for sample in made)
            if longest > length:
                if not counts:
                    raise InputError(f"{self.name} needs a length of {longest:,} tokens or more, not {length:,}")
                break
            counts.append(n_facts)
        plan = list(cells(counts, REPEATS["atc"]))
        for index in request.indices(len(plan)):
            yield self.make(request, *plan[index])

    def make(self, request: Request, n_facts: int, kind: str, repeat: int) -> Sample:
        rng = random.Random(f"{self.name}:{request.seed}:{kind}:{repeat}:{n_facts}")
        return ask(draw_chain(recipe_names(), n_facts, rng), kind, between=" ", repeat=repeat)


for _task in (SingleRetrieval(), MultiRetrieval(), MultiReasoning(), AncestralTrace()):
    register(_task)
