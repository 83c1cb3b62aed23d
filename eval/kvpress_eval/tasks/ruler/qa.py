"""Question answering among documents: one paragraph of SQuAD, or two of HotpotQA, hold the answer.

RULER takes question i of the file for sample i; ruler-posfix draws questions, going round the articles of SQuAD. Gold
documents come first, then the question's own others, then those of its article, then random ones; then all are shuffled.

Where one document more is too long and one less leaves under 97 % of the budget, which is the rule at 2,048 tokens, the
room is filled with the next documents that are short enough, of the same article if it has any. RULER would leave the
prompt shorter. At lengths that cannot hold all ten documents of a HotpotQA question, where RULER's generator never
returns, supporting documents stay and others are left out. No document is ever cut.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Literal

from kvpress_eval.prompts import load_prompts
from kvpress_eval.sample import Sample
from kvpress_eval.tasks.base import Request
from kvpress_eval.tasks.ruler.documents import Corpus, Question, hotpotqa, squad
from kvpress_eval.tasks.ruler.fit import LEAST, Draft
from kvpress_eval.tasks.ruler.sources import source
from kvpress_eval.tasks.ruler.task import N_SAMPLES, RulerTask, generator, percent_depth
from kvpress_eval.tasks.ruler.variants import Variant

#: fillers that are tried for ones of fitting length
CANDIDATES = 200


class QuestionAnswering(RulerTask):
    """The tasks "qa_1" (SQuAD 2.0) and "qa_2" (HotpotQA)."""

    metric = "ruler_part"

    def __init__(self, variant: Variant, task: Literal["qa_1", "qa_2"]) -> None:
        super().__init__(variant, task, "qa")
        self.description = "questions over SQuAD paragraphs" if task == "qa_1" else "two-hop questions over HotpotQA"
        if task == "qa_1" and variant.fixed_orders:
            self.caveat = "the gold document stands at one depth for each number of documents, and the first 500 questions are about 4 articles"

    def increment(self, length: int) -> int:
        return 10

    def cluster(self, question: Question) -> str:
        """Its article; its paragraph in the official order of SQuAD, where hundreds of questions are of one article."""
        paragraph = self.task == "qa_1" and self.variant.fixed_orders
        return f"{question.cluster}/{question.gold[0]}" if paragraph else question.cluster

    def drafts(self, request: Request) -> tuple[int, Callable[[int], Draft]]:
        if self.task == "qa_1":
            corpus = squad(source(request.data, "ruler/squad.json"))
        else:
            corpus = hotpotqa(source(request.data, "ruler/hotpotqa.json"))
        questions = corpus.questions
        if not self.variant.fixed_orders:
            questions = _round_robin(questions, generator(request, self.task, "questions"))
        counted: dict[int, int] = {}
        return min(N_SAMPLES, len(questions)), lambda index: _Drawn(
            self, request, index, questions[index], corpus, counted
        ).draft()


class _Drawn:
    """One question with its documents in the order in which they are taken. counted: tokens by document, shared."""

    def __init__(
        self,
        task: QuestionAnswering,
        request: Request,
        index: int,
        question: Question,
        corpus: Corpus,
        counted: dict[int, int],
    ) -> None:
        self.task, self.request, self.index = task, request, index
        self.question, self.documents, self._counted = question, corpus.documents, counted
        rng = generator(request, task.task, index)
        self._order, filler_seed = rng.getrandbits(64), rng.getrandbits(64)
        self._taken = [*question.gold, *(number for number in question.own if number not in question.gold)]
        self._fillers = self._drawn_fillers(random.Random(filler_seed))

    def draft(self) -> Draft:
        return Draft(
            lambda size: self._sample(self._first(size)),
            smallest=min(max(2, len(self.question.gold)), len(self.documents)),
            largest=len(self.documents),
            closer=self._closer,
        )

    def _drawn_fillers(self, rng: random.Random) -> Iterator[int]:
        """Indices of all other documents: those of the article first, both in random order."""
        near = list(self.question.near)
        rng.shuffle(near)
        yield from near
        seen = {*self.question.own, *near}
        while len(seen) < len(self.documents):
            number = rng.randrange(len(self.documents))
            if number not in seen:
                seen.add(number)
                yield number

    def _first(self, n_documents: int) -> list[int]:
        while len(self._taken) < n_documents:
            self._taken.append(next(self._fillers))
        return self._taken[:n_documents]

    def _closer(self, n_documents: int, missing: int) -> Iterator[Sample]:
        """Samples that keep most of the documents and fill the room with the next ones that fit into it."""
        self._first(min(n_documents + CANDIDATES, len(self.documents)))
        related = len(self.question.own) + len(self.question.near)
        for pool in (self._taken[:related], self._taken):
            for n_kept in range(n_documents, max(len(self.question.gold), n_documents - 4) - 1, -1):
                for skipped in range(4):
                    filled = self._filled(n_kept, pool[n_kept + skipped :], missing + self._sum(n_kept, n_documents))
                    if filled is not None:
                        yield self._sample(filled)

    def _filled(self, n_kept: int, candidates: list[int], room: int) -> list[int] | None:
        """The first documents and all candidates that still fit, in order; None if too much room stays."""
        slack = int((1 - LEAST) * (self.request.length or 0))
        chosen = self._taken[:n_kept]
        for number in candidates:
            if room <= slack:
                break
            if self._tokens(number) <= room:
                chosen.append(number)
                room -= self._tokens(number)
        return chosen if room <= slack else None

    def _sum(self, first: int, last: int) -> int:
        return sum(self._tokens(number) for number in self._taken[first:last])

    def _tokens(self, number: int) -> int:
        """Tokens that a document adds to a prompt."""
        if number not in self._counted:
            text = "\n\n" + str(load_prompts("ruler")["document"]).format(i=10, document=self.documents[number])
            self._counted[number] = len(self.request.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._counted[number]

    def _sample(self, numbers: list[int]) -> Sample:
        task, question = self.task, self.question
        if set(question.own) <= set(numbers):
            # the published order before the shuffle
            numbers = [*question.own, *(number for number in numbers if number not in question.own)]
        shuffled = task.variant.shuffled(numbers, self.request, self._order)
        template = str(load_prompts("ruler")["document"])
        context = "\n\n".join(
            template.format(i=place, document=self.documents[number]) for place, number in enumerate(shuffled, start=1)
        )
        before, behind, prefix = task.around_context(query=question.text)
        evidence = tuple(self.documents[number] for number in question.gold)
        return Sample(
            id=str(self.index),
            cluster=task.cluster(question),
            lead=before,
            context=context,
            question=behind,
            answer_prefix=prefix,
            answers=question.answers,
            metric=task.metric,
            max_new_tokens=int(task.frame["max_new_tokens"]),
            evidence=evidence,
            meta={
                "length": self.request.length,
                "depths": [percent_depth(context, document) for document in evidence],
                "documents": len(shuffled),
            },
        )


def _round_robin(questions: list[Question], rng: random.Random) -> list[Question]:
    """All questions, shuffled, one of each cluster in turn."""
    shuffled = rng.sample(questions, len(questions))
    rounds: dict[int, list[Question]] = {}
    asked: dict[str, int] = {}
    for question in shuffled:
        asked[question.cluster] = asked.get(question.cluster, 0) + 1
        rounds.setdefault(asked[question.cluster], []).append(question)
    return list(chain.from_iterable(rounds[number] for number in sorted(rounds)))
