"""What all RULER tasks share: a sample is drawn without its size, then fitted into the budget."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from kvpress_eval.prompts import load_prompts
from kvpress_eval.sample import Sample
from kvpress_eval.tasks.base import Request, Task
from kvpress_eval.tasks.ruler.fit import Draft, Fit
from kvpress_eval.tasks.ruler.variants import Variant

#: samples a task, as published
N_SAMPLES = 500


def generator(request: Request, task: str, index: int | str) -> random.Random:
    """The generator of one sample. Variants share it, so that they differ in what they are meant to differ in."""
    return random.Random(f"{request.seed}/{task}/{index}")


def percent_depth(context: str, piece: str) -> float:
    """Where a piece begins, in percent of the context's characters."""
    return round(100 * context.index(piece) / len(context), 1)


class RulerTask(Task):
    """Base of RULER's tasks.

    task: the published name, such as "niah_single_1". frame: its entry in prompts/ruler.yaml.
    """

    needs_length = True
    metric = "ruler_all"

    def __init__(self, variant: Variant, task: str, frame: str) -> None:
        self.variant, self.task = variant, task
        self.name, self.family = f"{variant.name}/{task}", variant.name
        self.frame: dict[str, Any] = load_prompts("ruler")[frame]

    @abstractmethod
    def drafts(self, request: Request) -> tuple[int, Callable[[int], Draft]]:
        """Number of samples there are, and the function that draws one.

        Raises:
            InputError: data is missing or wrong.
        """

    @abstractmethod
    def increment(self, length: int) -> int:
        """Units of filler by which the official code grows and shrinks a prompt."""

    def samples(self, request: Request) -> Iterator[Sample]:
        fit = Fit(request, self.name, self.increment(request.length or 0), self.variant.whole_increments)
        available, draft = self.drafts(request)
        # sample 0 is the probe, whichever are asked for
        first_size = fit.first_size(draft(0))
        for index in request.indices(available):
            yield fit.sample(draft(index), first_size)

    def around_context(self, **fields: object) -> tuple[str, str, str]:
        """The frame's text before and behind the context, and the answer prefix, with the fields filled in."""
        before, behind = str(self.frame["template"]).split("{context}")
        return before.format(**fields), behind.format(**fields), self.answer_prefix().format(**fields)

    def answer_prefix(self) -> str:
        """The answer prefix as the variant words it."""
        old = self.frame.get("answer_prefix_2024") if self.variant.old_wording else None
        return str(old or self.frame["answer_prefix"])
