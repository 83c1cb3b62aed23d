"""RULER's needle tasks: structure and wording against the published configuration, written out a second time here."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest
from ruler_support import samples

from kvpress_eval.data import Data
from kvpress_eval.data.packages import SHA256
from kvpress_eval.tasks.ruler.niah import DEPTHS

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
WORD, NUMBER = r"[a-z]+-[a-z]+", r"\d{7}"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
#: task: haystack, kind of value, key, value, keys, values a key, queried keys (scripts/synthetic.yaml)
PUBLISHED = {
    "niah_single_1": ("noise", "numbers", WORD, NUMBER, 1, 1, 1),
    "niah_single_2": ("essay", "numbers", WORD, NUMBER, 1, 1, 1),
    "niah_single_3": ("essay", "uuids", WORD, UUID, 1, 1, 1),
    "niah_multikey_1": ("essay", "numbers", WORD, NUMBER, 4, 1, 1),
    "niah_multikey_2": ("needle", "numbers", WORD, NUMBER, 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", UUID, UUID, 1, 1, 1),
    "niah_multivalue": ("essay", "numbers", WORD, NUMBER, 1, 4, 1),
    "niah_multiquery": ("essay", "numbers", WORD, NUMBER, 4, 1, 4),
}
FAMILIES = ("ruler-2024", "ruler-2026", "ruler-posfix")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", PUBLISHED)
def test_needles(ruler_data, family, task):
    haystack, kind, key, value, n_keys, n_values, n_queries = PUBLISHED[task]
    needle = re.compile(rf"One of the special magic {kind} for ({key}) is: ({value})\.")
    for sample in samples(ruler_data, f"{family}/{task}", 2048, 3):
        found = needle.findall(sample.context)
        asked = re.findall(key, sample.question)
        assert len(asked) == len(set(asked)) == n_queries
        assert sample.answers == tuple(v for k in asked for v in values_of(found, k, sample.answers))
        assert len(sample.answers) == n_queries * n_values
        assert sample.evidence == tuple(
            f"One of the special magic {kind} for {k} is: {v}."
            for k in asked
            for v in values_of(found, k, sample.answers)
        )
        lines = sample.context.split("\n")
        if haystack == "essay":
            assert len(found) == n_keys * n_values
            assert len({k for k, _ in found}) == n_keys
        elif haystack == "noise":
            assert [line for line in lines if line != NOISE] == list(sample.evidence)
            assert lines.count(NOISE) > 20
        else:
            assert len(found) == len(lines) > 10
            assert len({k for k, _ in found}) == len(found)  # no distractor shares the key
        assert sample.meta["depths"] == [
            pytest.approx(100 * sample.context.index(piece) / len(sample.context), abs=0.051)
            for piece in sample.evidence
        ]
        assert (sample.metric, sample.max_new_tokens, sample.meta["length"]) == ("ruler_all", 128, 2048)


def values_of(found, key, order):
    return sorted((v for k, v in found if k == key), key=order.index)


@pytest.mark.parametrize("task", [task for task, row in PUBLISHED.items() if row[0] == "essay"])
def test_needles_stand_between_sentences_at_depths_of_the_grid(ruler_data, task):
    grid = set(np.round(np.linspace(0, 100, num=40, endpoint=True)).astype(int).tolist())
    for sample in samples(ruler_data, f"ruler-2026/{task}", 2048, 6):
        # sentences of the small essays end in a full stop and nothing else does, so nltk is not needed to find them
        marked = re.sub(r"(One of the special magic .*? is: \S+)\.", r"|\1|", sample.context)
        pieces = [p for part in marked.split("|") for p in re.split(r"(?<=\.) ", part.strip()) if p]
        sentences = [p for p in pieces if not p.startswith("One of the special magic")]
        before, depths = 0, []
        for piece in pieces:
            if piece.startswith("One of the special magic"):
                depths.append({depth for depth in grid if int(len(sentences) * depth / 100) == before})
            else:
                before += 1
        assert all(depths)
        assert len(depths) in (1, 4)


def test_the_grid_is_the_published_one():
    assert list(DEPTHS) == np.round(np.linspace(0, 100, num=40, endpoint=True)).astype(int).tolist()


def test_no_distractor_has_the_key_that_is_asked_for(ruler_data, tmp_path, monkeypatch):
    """Two keys in all: every distractor must have the other one."""
    (tmp_path / "ruler").mkdir()
    for name, content in {"ruler/nounlist.txt": "house\ntree", "ruler/adjectivelist.txt": "big"}.items():
        (tmp_path / name).write_text(content)
        monkeypatch.setitem(SHA256, name, hashlib.sha256(content.encode()).hexdigest())
    for sample in samples(Data([tmp_path]), "ruler-2026/niah_multikey_2", 1024, 3):
        key = re.search(r"number for (\S+) mentioned", sample.question).group(1)
        assert sample.context.count(f"for {key} is") == 1
        assert sample.context.count(f"for {'big-tree' if key == 'big-house' else 'big-house'} is") > 5


def test_essays_begin_alike_and_end_where_the_budget_ends(ruler_data):
    first, second = samples(ruler_data, "ruler-2026/niah_single_2", 2048, 2)
    text = [
        re.sub(r" ?One of the special magic .* is: \d+\. ?", " ", sample.context).strip() for sample in (first, second)
    ]
    shorter = min(map(len, text))
    assert text[0][:shorter] == text[1][:shorter]


def test_singular_frame(ruler_data):
    (sample,) = samples(ruler_data, "ruler-2026/niah_single_3", 2048, 1)
    key = re.search(f"for ({WORD}) is: {re.escape(sample.answers[0])}", sample.context).group(1)
    assert sample.text + sample.answer_prefix == (
        "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you about the uuid "
        f"afterwards.\n{sample.context}\nWhat is the special magic uuid for {key} mentioned in the provided text? The special "
        f"magic uuid for {key} mentioned in the provided text is"
    )


def test_plural_frame_and_list_of_queries(ruler_data):
    (sample,) = samples(ruler_data, "ruler-2024/niah_multiquery", 2048, 1)
    of = {v: k for k, v in re.findall(rf"for ({WORD}) is: (\d+)\.", sample.context)}
    a, b, c, d = (of[value] for value in sample.answers)
    assert sample.text + sample.answer_prefix == (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about the "
        f"numbers afterwards.\n{sample.context}\nWhat are all the special magic numbers for {a}, {b}, {c}, and {d} mentioned in "
        f"the provided text? The special magic numbers for {a}, {b}, {c}, and {d} mentioned in the provided text are"
    )


def test_four_values_are_asked_for_in_the_plural(ruler_data):
    (sample,) = samples(ruler_data, "ruler-2026/niah_multivalue", 2048, 1)
    assert sample.lead.startswith("Some special magic numbers are hidden")
    assert sample.answer_prefix.endswith("mentioned in the provided text are")


def test_order_of_needles_is_one_permutation_or_one_for_each_sample(ruler_data):
    def orders(family):
        found = samples(ruler_data, f"{family}/niah_multivalue", 2048, 12)
        return {tuple(sorted(range(4), key=lambda i, s=s: s.context.index(s.evidence[i]))) for s in found}

    assert len(orders("ruler-2024")) == len(orders("ruler-2026")) == 1
    assert len(orders("ruler-posfix")) > 3
