"""Runs each question of the demo with the full cache and with each contract, one prefill a question.

The question is part of the prompt, as it is when a user asks about a document: the contracts see it at prefill.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpress.contract import Contract, resolve
from kvpress.demo.data import Question, read_document, read_questions
from kvpress.prompt import build_prompt
from kvpress.run import FULL_CACHE, Run, run

#: what stands beside the full cache: one selector that looks at the question, and one that looks at nothing
CONTRACTS = ("snapkv", "streaming_llm")
BUDGET = 0.5
MAX_NEW_TOKENS = 24


@dataclass(frozen=True)
class Answer:
    """One question answered by one arm."""

    question: Question
    run: Run

    @property
    def right(self) -> bool:
        return self.question.is_right(self.run.text)


def arms(budget: float = BUDGET, contracts: Sequence[str] = CONTRACTS) -> list[Contract | None]:
    """The full cache (None) and the contracts, each at `budget`."""
    return [None, *(resolve(name, budget) for name in contracts)]


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    budget: float = BUDGET,
    contracts: Sequence[str] = CONTRACTS,
) -> Iterator[Answer]:
    """Every question under every arm, question by question, as soon as each is there."""
    document = read_document()
    for question in read_questions():
        prompt = build_prompt(tokenizer, document, question.text, chat=True)
        for arm in arms(budget, contracts):
            yield Answer(question, run(model, tokenizer, prompt, arm, max_new_tokens=MAX_NEW_TOKENS))


def lost_answers(given: list[Answer], contract: str) -> list[Question]:
    """Questions that the full cache answers right and `contract` does not."""
    right = {answer.question for answer in given if answer.run.contract == FULL_CACHE and answer.right}
    wrong = [answer.question for answer in given if answer.run.contract == contract and not answer.right]
    return [question for question in wrong if question in right]
