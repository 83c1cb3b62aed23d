"""Variable tracking: one chain of assignments in noise; which variables hold the value? A worked example comes first."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from kvpress_eval.prompts import load_prompts
from kvpress_eval.sample import Sample
from kvpress_eval.tasks.base import Request
from kvpress_eval.tasks.ruler.fit import Draft
from kvpress_eval.tasks.ruler.task import N_SAMPLES, RulerTask, generator, percent_depth
from kvpress_eval.tasks.ruler.variants import Variant

#: assignments behind the first one, so that HOPS + 1 variables hold the value
HOPS = 4
EXAMPLE_TOKENS = 500


@dataclass(frozen=True)
class Chain:
    """names: of the variables, first to last. value: of all of them."""

    names: tuple[str, ...]
    value: int

    @classmethod
    def drawn(cls, rng: random.Random, letters: int) -> Chain:
        names: list[str] = []
        while len(names) < HOPS + 1:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            if name not in names and name != "VAR":
                names.append(name)
        return cls(tuple(names), rng.randrange(10_000, 99_999))

    @property
    def statements(self) -> list[str]:
        """The assignments in order; all but the first end in a space, as published."""
        first = f"VAR {self.names[0]} = {self.value}"
        return [first, *(f"VAR {b} = VAR {a} " for a, b in zip(self.names[:-1], self.names[1:], strict=True))]


class VariableTracking(RulerTask):
    """The task "vt". The context begins in the middle of the worked example, behind the example's own introduction."""

    def __init__(self, variant: Variant) -> None:
        super().__init__(variant, "vt", "variable_tracking")
        self.description = "which five variables hold the value, in one chain of four hops"

    def increment(self, length: int) -> int:
        return 10 if self.variant.old_wording or length >= 4096 else 5

    def drafts(self, request: Request) -> tuple[int, Callable[[int], Draft]]:
        shared = generator(request, self.task, "example")
        places, names = shared.getrandbits(64), shared.getrandbits(64)
        n_lines = self._example_lines(request, Chain.drawn(random.Random(names), letters=3))

        def draft(index: int) -> Draft:
            rng = generator(request, self.task, index)
            chain, seed = Chain.drawn(rng, letters=5), rng.getrandbits(64)
            own_names, own_places = rng.getrandbits(64), rng.getrandbits(64)
            example_chain = Chain.drawn(random.Random(names if self.variant.old_wording else own_names), letters=3)
            example_places = places if self.variant.fixed_orders else own_places
            example = self._example(example_chain, self._noisy(example_chain, n_lines, example_places))
            return Draft(lambda size: self._sample(request, index, chain, example, size, seed), smallest=HOPS + 2)

        return N_SAMPLES, draft

    def _noisy(self, chain: Chain, n_lines: int, seed: int) -> str:
        """The statements, in order, at random places between lines of noise."""
        noise = str(load_prompts("ruler")["noise"])
        lines = [noise + "\n" if self.variant.old_wording else noise] * n_lines
        places = sorted(random.Random(seed).sample(range(n_lines), HOPS + 1))
        for shift, (place, statement) in enumerate(zip(places, chain.statements, strict=True)):
            lines.insert(place + shift, statement)
        return (" " if self.variant.old_wording else "\n").join(lines)

    def _example(self, chain: Chain, context: str) -> str:
        """The worked example with its answer; its frame is the task's, in front of the task's."""
        before, behind, prefix = self.around_context(query=chain.value, num_v=HOPS + 1)
        answered = f"{before}{context}{behind}{prefix} {' '.join(chain.names)}"
        return f" {answered}\n\n\n\n" if self.variant.old_wording else f"{answered}\n\n"

    def _example_lines(self, request: Request, chain: Chain) -> int:
        """Lines of noise in the example: as many as fit into EXAMPLE_TOKENS, in increments of 5 for the 2024 code."""
        step, most = (5 if self.variant.old_wording else 1), HOPS + 1

        def tokens(n_lines: int) -> int:
            text = self._example(chain, self._noisy(chain, n_lines, 0))
            return len(request.tokenizer(text, add_special_tokens=False)["input_ids"])

        while tokens(most + step) <= EXAMPLE_TOKENS:
            most += step
        return most

    def _sample(self, request: Request, index: int, chain: Chain, example: str, n_lines: int, seed: int) -> Sample:
        before, behind, prefix = self.around_context(query=chain.value, num_v=HOPS + 1)
        # what the example and the task begin with is the lead, so that no truncation touches it
        lead = example[: example.index(before) + len(before)]
        context = example[len(lead) :] + before + self._noisy(chain, n_lines, seed)
        evidence = tuple(statement.strip() for statement in chain.statements)
        return Sample(
            id=str(index),
            cluster=str(index),
            lead=lead,
            context=context,
            question=behind,
            answer_prefix=prefix,
            answers=chain.names,
            metric=self.metric,
            max_new_tokens=int(self.frame["max_new_tokens"]),
            evidence=evidence,
            meta={"length": request.length, "depths": [percent_depth(context, piece) for piece in evidence]},
        )
