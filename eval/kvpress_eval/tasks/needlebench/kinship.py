"""Chains of kinship: each fact says that one person is the parent or grandparent of the next."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from kvpress_eval.prompts import load_prompts


@dataclass(frozen=True)
class Chain:
    """People from the eldest to the youngest, the facts that link them in shuffled order, and the generations between
    the two ends."""

    names: tuple[str, ...]
    facts: tuple[str, ...]
    generations: int

    @property
    def eldest(self) -> str:
        return self.names[0]

    @property
    def youngest(self) -> str:
        return self.names[-1]


def draw_chain(names: Sequence[str], n_facts: int, rng: random.Random) -> Chain:
    """A chain of n facts. The order of the draws is the original's (multi.py, atc.py), so that its seeds give its chains."""
    kinship: dict[str, Any] = load_prompts("needlebench")["kinship"]
    relations: dict[str, int] = kinship["relations"]
    people = rng.sample(list(names), n_facts + 1)
    facts, generations = [], 0
    for elder, younger in pairwise(people):
        sentence = rng.choice(kinship["sentences"])
        relation = rng.choice(list(relations))
        facts.append(sentence.format(A=elder, B=younger, relationship=relation))
        generations += relations[relation]
    rng.shuffle(facts)
    return Chain(tuple(people), tuple(facts), generations)


def recipe_names() -> list[str]:
    """Invented names, enough for the longest chain."""
    names = load_prompts("needlebench_recipe")["names"]
    return [f"{given} {family}" for given in names["given"] for family in names["family"]]
