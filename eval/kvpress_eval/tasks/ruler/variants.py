"""Which RULER: the code behind the published tables, the present code, or the present code without its fixed orders.

ruler-2024 (hsiehjackson/RULER e40fae1): the filler grows in whole increments (500 words of essay, 25 lines, 10
    documents); one worked example of variable tracking for all samples, statements and noise joined by spaces, and
    "assgined" in its answer prefix; no space in front of the example's answer in common words.
    Not reproduced, on purpose: prompts that overshoot the budget (frequent words did not reserve the generated tokens,
    variable tracking did not count all of its example); short prompts where the essays end (they are repeated); an
    endless loop where the smallest prompt is too long (an InputError); and the worked example of variable tracking is
    not robbed of its line breaks and of the last word of its question, which happened under chat templates only.
ruler-2026 (NVIDIA/RULER c3f5e3b): the filler is fitted by binary search on one sample; each statement of variable
    tracking on a line of its own, and a worked example with other names and another value for every sample.
ruler-posfix: as ruler-2026, but every order is shuffled by seed and index. The official code shuffles with a fresh
    generator of the same seed for every sample, so that all gold documents of qa_1 stand at one depth, needles come in
    one order, and word lists have one permutation: a method that favours a position is rewarded or punished by chance.
    Questions of qa_1 go round the articles (the official first 500 come from 4 of 35), questions of qa_2 are drawn.

In all three, a prompt of less than 97 % of its budget, which whole increments leave at short lengths, is filled up by
smaller steps: single words, lines or documents (see `fit.py`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TypeVar

from kvpress_eval.tasks.base import Request

T = TypeVar("T")


@dataclass(frozen=True)
class Variant:
    """What distinguishes one version of RULER from another.

    whole_increments: sizes of the filler are multiples of the task's increment. fixed_orders: all samples share one
    permutation for each number of items. old_wording: frames and separators of the 2024 code.
    """

    name: str
    whole_increments: bool
    fixed_orders: bool
    old_wording: bool

    def shuffled(self, items: list[T], request: Request, own_seed: int) -> list[T]:
        """The items in the variant's order: that of a fresh generator of the run's seed, or of the sample's own."""
        items = list(items)
        random.Random(request.seed if self.fixed_orders else own_seed).shuffle(items)
        return items


VARIANTS = (
    Variant("ruler-2024", whole_increments=True, fixed_orders=True, old_wording=True),
    Variant("ruler-2026", whole_increments=False, fixed_orders=True, old_wording=False),
    Variant("ruler-posfix", whole_increments=False, fixed_orders=False, old_wording=False),
)
