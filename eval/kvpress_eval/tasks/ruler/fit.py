"""Fitting a prompt into its budget: as much filler as fits, never more than 100 % of the length, never under 97 %.

The budget counts everything: chat template, task text, answer prefix and the tokens to be generated, in the evaluated
model's tokenizer, without BOS (RULER counts with `tokenizer.tokenize`). RULER finds the size on one sample and takes
whole increments away from every sample that is too long; at short lengths that leaves less than 97 %, so what is
missing is filled up in steps of one unit, and where even one unit is too coarse, by choosing units of a fitting length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvpress.errors import InputError
from kvpress_eval.prompt import render
from kvpress_eval.sample import Sample
from kvpress_eval.tasks.base import Request

#: least share of the budget that a prompt must fill
LEAST = 0.97


@dataclass(frozen=True)
class Draft:
    """A sample of which all is drawn but its size.

    at: the sample with so many units of filler (words, lines, documents); more units never make it shorter.
    smallest, largest: sizes that make sense; largest None has no end. closer: for a size that leaves too much room and
    of which the next one is too long, samples that fill the room better; given the size and the missing tokens.
    """

    at: Callable[[int], Sample]
    smallest: int
    largest: int | None = None
    closer: Callable[[int, int], Iterator[Sample]] | None = None


def n_tokens(request: Request, sample: Sample) -> int:
    """Tokens of prompt and answer together, BOS apart."""
    ids = render(request.tokenizer, sample, chat=request.chat).ids
    bos = request.tokenizer.bos_token_id
    return len(ids) - (bos is not None and ids[:1] == (bos,)) + sample.max_new_tokens


class Fit:
    """Fits the drafts of one task into `request.length`."""

    def __init__(self, request: Request, name: str, increment: int, whole_increments: bool) -> None:
        if request.length is None:
            raise InputError(f"{name} is generated to a length: give one, for example --length 4096")
        self.request, self.name, self.length = request, name, request.length
        self.increment, self.whole_increments = increment, whole_increments

    def first_size(self, probe: Draft) -> int:
        """Units of filler at which a task's samples begin, found on one of them."""
        tokens = self._counter(probe)
        self._check_smallest(probe, tokens)
        low, high = probe.smallest, probe.smallest
        while tokens(high) <= self.length and high != probe.largest:
            low, high = high, _at_most(2 * high, probe.largest)
        size = _largest_that_fits(tokens, low, high, self.length)
        if self.whole_increments:
            size = max(size // self.increment * self.increment, probe.smallest)
        return size

    def sample(self, draft: Draft, first_size: int) -> Sample:
        """The draft with a size that fits.

        Raises:
            InputError: the smallest size is too long, or no size comes to 97 %.
        """
        tokens = self._counter(draft)
        size = max(_at_most(first_size, draft.largest), draft.smallest)
        while tokens(size) > self.length and size > draft.smallest:
            size = max(size - self.increment, draft.smallest)
        self._check_smallest(draft, tokens)
        if not self._enough(tokens(size)):
            # the size is short of its own start by less than an increment, or of another sample's by a few units
            low, high = size, _at_most(size + self.increment, draft.largest)
            while tokens(high) <= self.length and high != draft.largest:
                low, high = high, _at_most(2 * high, draft.largest)
            size = _largest_that_fits(tokens, low, high, self.length)
        sample = draft.at(size)
        if self._enough(tokens(size)):
            return sample
        if draft.closer is not None:
            for closer in draft.closer(size, self.length - tokens(size)):
                if self._enough(n_tokens(self.request, closer)):
                    return closer
        if size == draft.largest:
            raise InputError(
                f"{self.name} has material for {tokens(size):,} tokens at most, not for {self.length:,}: use a shorter length"
            )
        step = tokens(size + 1) - tokens(size)
        raise InputError(
            f"{self.name} grows in steps of {step} tokens with this tokenizer and cannot fill {LEAST:.0%} of {self.length:,}: "
            f"use a length of at least {math.ceil(step / (1 - LEAST)):,}"
        )

    def _counter(self, draft: Draft) -> Callable[[int], int]:
        counted: dict[int, int] = {}

        def tokens(size: int) -> int:
            if size not in counted:
                counted[size] = n_tokens(self.request, draft.at(size))
            return counted[size]

        return tokens

    def _enough(self, tokens: int) -> bool:
        return LEAST * self.length <= tokens <= self.length

    def _check_smallest(self, draft: Draft, tokens: Callable[[int], int]) -> None:
        smallest = tokens(draft.smallest)
        if smallest > self.length:
            raise InputError(
                f"{self.name} does not fit into {self.length:,} tokens: its sample '{draft.at(draft.smallest).id}' needs at "
                f"least {smallest:,} with this tokenizer"
            )


def _at_most(size: int, largest: int | None) -> int:
    return size if largest is None else min(size, largest)


def _largest_that_fits(tokens: Callable[[int], int], low: int, high: int, budget: int) -> int:
    """Largest size in [low, high] of at most `budget` tokens, `low` being one; tokens are nearly linear in the size."""
    if tokens(high) <= budget:
        return high
    while high - low > 1:
        share = (budget - tokens(low)) / (tokens(high) - tokens(low))
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        if tokens(middle) <= budget:
            low = middle
        else:
            high = middle
    return low
