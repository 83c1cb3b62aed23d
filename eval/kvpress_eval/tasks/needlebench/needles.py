"""Needles: one sentence each, with the question that it answers and the keyword that a right answer contains."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvpress.errors import InputError
from kvpress_eval.prompts import load_prompts


@dataclass(frozen=True)
class Needle:
    """One fact. `arg1` is what the question asks about, `arg2` the keyword of the answer; `id` names it in records."""

    id: str
    arg1: str
    arg2: str
    text: str
    question: str


def read_needles(path: Path, language: str) -> list[Needle]:
    """Needles of one language out of NeedleBench's needles.jsonl; ids are the row numbers of the file, from 0.

    Raises:
        InputError: a row is no needle.
    """
    needles = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if row["language"] == language:
                fields = (row["arg1"], row["arg2"], row["needle"], row["retrieval_question"])
                needles.append(Needle(str(number), *map(str, fields)))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"'{path}' line {number + 1} is no needle ({error!r}): get the original file") from None
    return needles


def recipe_needles() -> list[Needle]:
    """Our own needles, in the published grammar: `prompts/needlebench_recipe.yaml`."""
    return [
        Needle(
            f"{family['id']}-{number}",
            arg1,
            arg2,
            family["needle"].format(arg1=arg1, arg2=arg2),
            family["question"].format(arg1=arg1),
        )
        for family in load_prompts("needlebench_recipe")["families"]
        for number, (arg1, arg2) in enumerate(family["entries"])
    ]


def draw_distinct(needles: Sequence[Needle], n: int, rng: random.Random) -> list[Needle]:
    """The first n of a shuffled copy that share neither `arg1` nor `arg2` with one before them.

    Raises:
        InputError: there are not so many.
    """
    shuffled = list(needles)
    rng.shuffle(shuffled)
    drawn: list[Needle] = []
    for needle in shuffled:
        if all(needle.arg1 != other.arg1 and needle.arg2 != other.arg2 for other in drawn):
            drawn.append(needle)
            if len(drawn) == n:
                return drawn
    raise InputError(f"there are {len(drawn)} needles with distinct names, and this task needs {n}: use the full file")


def combined_question(needles: Sequence[Needle], language: str) -> str:
    """One question for all needles, in the form of the original (parallel.py), its missing space included.

    Each question counts up to its first question mark; each format is what stands between the first quotes, up to the
    first full stop.
    """
    frame: dict[str, str] = load_prompts("needlebench")[language]
    mark, joint = frame["question_mark"], frame["joint"]
    questions = joint.join(needle.question.split(mark)[0] + mark for needle in needles)
    formats = joint.join(needle.question.split("'")[1].split(frame["full_stop"])[0] for needle in needles)
    return questions + frame["format_request"].replace("{formats}", formats)
