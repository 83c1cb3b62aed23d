"""The demo's document and its questions with known answers, read from the package."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Question:
    """A question on the document, and the strings one of which a right answer contains."""

    text: str
    accepted: tuple[str, ...]

    def is_right(self, answer: str) -> bool:
        """True if the first sentence of the answer contains an accepted string, upper and lower case alike.

        A small model that does not know goes on talking; what it mentions later is no answer.
        """
        return self.mentioned_in(re.split(r"(?<=[.!?])\s|\n", answer.strip(), maxsplit=1)[0])

    def mentioned_in(self, text: str) -> bool:
        """True if the text contains an accepted string anywhere."""
        return any(string.casefold() in text.casefold() for string in self.accepted)


def read_document() -> str:
    """The document, about 1,600 tokens of a small model's tokenizer."""
    return resources.files("kvpress.demo").joinpath("document.txt").read_text(encoding="utf-8")


def read_questions() -> list[Question]:
    """The questions, in the order of the file."""
    data = json.loads(resources.files("kvpress.demo").joinpath("questions.json").read_text(encoding="utf-8"))
    return [Question(item["question"], tuple(item["accepted"])) for item in data["questions"]]
