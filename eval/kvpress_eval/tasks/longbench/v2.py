"""LongBench v2: 503 questions with four choices on documents of 8,000 to 2,000,000 words, as one task.

The zero-shot protocol. The chain-of-thought protocol is left out: it makes a second call with the model's own answer in
the prompt and the document taken out, which is not one prompt with one cache.
Source: THUDM/LongBench 2e00731, pred.py and result.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import islice
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvpress.errors import InputError
from kvpress_eval.prompts import load_prompts
from kvpress_eval.sample import Sample
from kvpress_eval.tasks.base import Request, Task, register
from kvpress_eval.tasks.longbench.stream import stream_array

GET = "kvpress data fetch longbench-v2"
#: the longest documents have about 2 million words
MAX_ITEM_CHARACTERS = 64 * 2**20


class Item(BaseModel):
    """The official schema of data.json."""

    model_config = ConfigDict(frozen=True, strict=True)
    id: str = Field(alias="_id", min_length=1, max_length=200)
    domain: str
    sub_domain: str
    difficulty: Literal["easy", "hard"]
    length: Literal["short", "medium", "long"]
    question: str
    choice_A: str
    choice_B: str
    choice_C: str
    choice_D: str
    answer: Literal["A", "B", "C", "D"]
    context: str


class LongBenchV2(Task):
    name, family, official = "longbench-v2", "longbench-v2", 503
    description = "503 multiple-choice questions on very long documents, multiple_choice"
    caveat = (
        "decoded greedily, the official runs sample at temperature 0.1; an answer without the asked-for sentence counts "
        "as wrong, the official script leaves empty ones out"
    )

    def samples(self, request: Request) -> Iterator[Sample]:
        path = request.data.first(["longbench-v2/data.json", "longbench_v2/data.json", "data.json"], get=GET)
        items = stream_array(path, max_characters=MAX_ITEM_CHARACTERS)
        for index, content in enumerate(islice(items, request.limit)):
            try:
                item = Item.model_validate(content)
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(map(str, first["loc"]))
                raise InputError(
                    f"item {index} of '{path}' is none of LongBench v2 (field {field}: {first['msg']}): get the file with "
                    f"`{GET}`"
                ) from None
            yield _sample(item)


def _sample(item: Item) -> Sample:
    lead, question = load_prompts("longbench_v2")["0shot"].split("$DOC$")
    fields = {"$Q$": item.question} | {f"$C_{letter}$": getattr(item, f"choice_{letter}") for letter in "ABCD"}
    # in one pass: a question may contain what looks like a field
    filled = re.sub(r"\$(Q|C_[A-D])\$", lambda found: str(fields[found[0]]).strip(), question)
    context = item.context.strip()
    return Sample(
        id=item.id,
        cluster=hashlib.sha256(context.encode()).hexdigest()[:16],
        lead=lead,
        context=context,
        question=filled,
        answer_prefix="",
        answers=(item.answer,),
        metric="multiple_choice",
        max_new_tokens=128,
        reference=f"The correct answer is ({item.answer}).",
        meta={
            "domain": item.domain,
            "sub_domain": item.sub_domain,
            "difficulty": item.difficulty,
            "length": item.length,
        },
    )


register(LongBenchV2())
