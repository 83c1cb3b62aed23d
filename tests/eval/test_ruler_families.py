"""RULER's registry and what holds for all tasks: seeds, limits, perfect and empty answers."""

from __future__ import annotations

import random

import pytest
from ruler_support import samples

from kvpress_eval.scorers import find_scorer
from kvpress_eval.tasks import find_tasks

NAMES = [
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
]


@pytest.mark.parametrize("family", ["ruler-2024", "ruler-2026", "ruler-posfix"])
def test_thirteen_tasks_in_the_published_order(family):
    tasks = find_tasks(family)
    assert [task.name for task in tasks] == [f"{family}/{name}" for name in NAMES]
    assert all(task.needs_length and task.description and task.in_macro for task in tasks)


@pytest.mark.parametrize("family", ["ruler-2024", "ruler-posfix"])
@pytest.mark.parametrize("task", NAMES)
def test_a_sample_depends_on_seed_and_index_alone(ruler_data, family, task):
    # a line of uuids is a coarse step at 1,024 tokens
    name, length = f"{family}/{task}", 2048 if task == "niah_multikey_3" else 1024
    random.seed(5)
    state = random.getstate()
    five = samples(ruler_data, name, length, 5)
    assert random.getstate() == state
    random.seed(6)
    assert samples(ruler_data, name, length, 3) == five[:3]
    assert [sample.id for sample in five] == ["0", "1", "2", "3", "4"]
    assert len({sample.context for sample in five}) == 5
    other = samples(ruler_data, name, length, 2, seed=43)
    assert all(a.context != b.context for a, b in zip(five, other, strict=False))


@pytest.mark.parametrize("task", NAMES)
def test_perfect_and_empty_answers(ruler_data, task):
    for sample in samples(ruler_data, f"ruler-2026/{task}", 1536, 3):
        score = find_scorer(sample.metric)
        assert score(", ".join(sample.answers), sample).value == 1
        assert score(f" {sample.answers[0]}.", sample).value == (
            1 if task.startswith("qa") else 1 / len(sample.answers)
        )
        assert score("", sample).value == 0
        assert score("###", sample).value == 0


@pytest.mark.parametrize("task", NAMES)
def test_evidence_stands_in_the_context(ruler_data, task):
    for sample in samples(ruler_data, f"ruler-posfix/{task}", 1536, 3):
        assert len(sample.evidence) == len(sample.meta["depths"])
        assert all(piece in sample.context for piece in sample.evidence)
        assert bool(sample.evidence) == (task not in ("cwe", "fwe"))
        assert sample.answer_prefix.startswith(" ")
