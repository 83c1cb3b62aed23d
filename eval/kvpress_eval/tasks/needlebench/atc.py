"""ATC, the ancestral trace challenge: a shuffled chain of kinship and a question about its two ends, without a haystack.

Source: opencompass/datasets/needlebench_v2/atc.py. The original weights accuracy by the number of needles, and gives the
largest number with at least 50 % as ENL-50; both can be had from the records' meta field "facts".
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

from kvpress_eval.data.needlebench import GET, SHA256
from kvpress_eval.prompts import load_prompts
from kvpress_eval.sample import Sample
from kvpress_eval.tasks.base import Request, Task, register
from kvpress_eval.tasks.needlebench.grid import diagonal, fill, halves
from kvpress_eval.tasks.needlebench.kinship import Chain, draw_chain

PROTOCOL: dict[str, Any] = load_prompts("needlebench")


def ask(chain: Chain, kind: str, *, between: str, repeat: int) -> Sample:
    """One question about a chain; `between` joins its facts."""
    values = {"eldest": chain.eldest, "youngest": chain.youngest, "generations": chain.generations}
    lead, question = halves(fill(PROTOCOL["atc"][kind], **values))
    answers = {"nth_descendant": chain.youngest, "relationship_distance": str(chain.generations)}
    return Sample(
        id=f"{kind}-repeat-{repeat}-facts-{len(chain.facts)}",
        cluster=f"{kind}-repeat-{repeat}",
        lead=lead,
        context=between.join(chain.facts),
        question=question,
        answer_prefix="",
        answers=(answers.get(kind, chain.eldest),),
        reference=f"\\boxed{{{answers.get(kind, chain.eldest)}}}",
        metric="boxed",
        max_new_tokens=PROTOCOL["max_new_tokens"]["atc"],
        evidence=chain.facts,
        meta={"facts": len(chain.facts), "question": kind, "repeat": repeat},
    )


def cells(counts: Sequence[int], repeats: int) -> Iterator[tuple[int, str, int]]:
    """(facts, type of question, repeat) of all samples: every number of facts and type once before a repeat comes."""
    for repeat in range(repeats):
        for n_facts, kind in diagonal(counts, list(PROTOCOL["atc"])):
            yield n_facts, kind, repeat


class AncestralTrace(Task):
    """The original's chains: its seeds, its names, its sentences without a space between them."""

    needs_length = False
    description = "kinship chains of 2 to 512 facts, four types of question"
    caveat = "chains of 512 facts have about 11,000 tokens, whatever length is asked for"

    def __init__(self, family: str) -> None:
        self.family, self.name = family, f"{family}/atc"

    def samples(self, request: Request) -> Iterator[Sample]:
        path = request.data.path("needlebench/names.json", sha256=SHA256["names.json"], get=GET)
        names = json.loads(path.read_text(encoding="utf-8"))["English"].split(",")
        kinds = list(PROTOCOL["atc"])
        plan = list(cells(PROTOCOL["atc_needles"], PROTOCOL["repeats"]["atc"]))
        for index in request.indices(len(plan)):
            n_facts, kind, repeat = plan[index]
            rng = random.Random(repeat + 1 + 10_000 * kinds.index(kind))
            yield ask(draw_chain(names, n_facts, rng), kind, between="", repeat=repeat)


for _family in ("needlebench-v2", "needlebench-v2-fixed"):
    register(AncestralTrace(_family))
