"""RULER's vt: one chain of five variables in noise behind a worked example, in the wording of each version."""

from __future__ import annotations

import itertools
import re

import pytest
from ruler_support import bpe, samples

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
LEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = "\nQuestion: Find all variables that are assigned the value {} in the text above."
PREFIX = " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are {} the value {}, they are: "


def parts(sample):
    """Text of the worked example and of the task, both without the frame's introduction."""
    example, task = (sample.lead + sample.context).split(LEAD)[1:]
    return example, task


def chain_of(text, letters):
    """Names and value of a chain; the statements must be in order and whole."""
    name = rf"[A-Z]{{{letters}}}"
    assigned = re.findall(rf"VAR ({name}) = (\d+|VAR {name})", text)
    names, values = [a for a, _ in assigned], [b for _, b in assigned]
    assert values[1:] == [f"VAR {previous}" for previous in names[:-1]]
    assert 10_000 <= int(values[0]) <= 99_998
    assert len(set(names)) == 5
    return tuple(names), values[0]


@pytest.mark.parametrize(
    ("family", "verb"), [("ruler-2024", "assgined"), ("ruler-2026", "assigned"), ("ruler-posfix", "assigned")]
)
def test_chain_example_and_frame(ruler_data, family, verb):
    for sample in samples(ruler_data, f"{family}/vt", 2048, 4):
        example, task = parts(sample)
        names, value = chain_of(task, 5)
        assert sample.answers == names
        assert sample.question == QUESTION.format(value)
        assert sample.answer_prefix == PREFIX.format(verb, value)
        assert sample.evidence == (
            f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(names))
        )  # fmt: skip
        assert all(piece in sample.context for piece in sample.evidence)
        assert sample.meta["depths"] == sorted(sample.meta["depths"])

        shown, answered = example.split("\nQuestion:")
        example_names, example_value = chain_of(shown, 3)
        assert f"\nQuestion:{answered}".rstrip() == (
            QUESTION.format(example_value) + PREFIX.format(verb, example_value) + " " + " ".join(example_names)
        )
        assert len(bpe()(sample.lead + example, add_special_tokens=False)["input_ids"]) <= 500
        assert (sample.metric, sample.max_new_tokens) == ("ruler_all", 30)


def test_statements_stand_on_lines_of_their_own_since_2025(ruler_data):
    (sample,) = samples(ruler_data, "ruler-2026/vt", 2048, 1)
    lines = parts(sample)[1].split("\n")
    statements = [line for line in lines if line != NOISE]
    assert [line.strip() for line in statements] == list(sample.evidence)
    assert all(line.endswith(" ") for line in statements[1:])  # as published
    assert sample.context.endswith((NOISE, " "))
    assert parts(sample)[0].endswith("\n\n")


def test_statements_and_noise_are_joined_by_spaces_in_2024(ruler_data):
    (sample,) = samples(ruler_data, "ruler-2024/vt", 2048, 1)
    rebuilt = parts(sample)[1]
    for statement in sample.evidence:
        assert rebuilt.count(statement) == 1
        rebuilt = rebuilt.replace(statement, "", 1)
    assert set(re.sub(r"\s+", " ", rebuilt).replace(NOISE, "")) == {" "}
    assert f"{NOISE}\n {NOISE}\n" in rebuilt
    assert parts(sample)[0].endswith("\n\n\n\n")


def test_worked_example_of_each_version(ruler_data):
    def examples(family):
        return [parts(sample)[0] for sample in samples(ruler_data, f"{family}/vt", 2048, 4)]

    assert len(set(examples("ruler-2024"))) == 1
    anew = examples("ruler-2026")
    assert len(set(anew)) == 4
    # names and values are new, places are not
    assert len({re.sub(r"\b[A-Z]{3}\b|\d{5}", "#", example) for example in anew}) == 1
    assert len({re.sub(r"\b[A-Z]{3}\b|\d{5}", "#", example) for example in examples("ruler-posfix")}) > 1
