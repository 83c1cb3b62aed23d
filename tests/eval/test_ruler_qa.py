"""RULER's qa: which documents stand in the prompt, where the gold one stands, and which question is asked."""

from __future__ import annotations

import json
import random
import re

import pytest
from ruler_support import N_PARAGRAPHS, hotpotqa, samples, squad

from kvpress.errors import InputError
from kvpress_eval.tasks.ruler.variants import VARIANTS

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


def documents(sample):
    """Documents of a prompt, whose numbers must be 1, 2, 3, ..."""
    numbered = re.split(r"(?:^|\n\n)Document (\d+):\n", sample.context)[1:]
    assert [int(number) for number in numbered[::2]] == list(range(1, len(numbered) // 2 + 1))
    return numbered[1::2]


def answerable(articles):
    """(article, paragraph, question, texts of the answers) in file order."""
    return [
        (article, paragraph["context"], asked["question"], [answer["text"] for answer in asked["answers"]])
        for article in articles
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
        if not asked["is_impossible"]
    ]


@pytest.mark.parametrize("length", [1024, 2048, 8192])
def test_squad_asks_the_questions_in_file_order_among_paragraphs_of_the_article_first(ruler_data, length):
    articles = squad(random.Random(4))["data"]
    everything = {paragraph["context"] for article in articles for paragraph in article["paragraphs"]}
    found = samples(ruler_data, "ruler-2026/qa_1", length, 5)
    for sample, (article, gold, question, answers) in zip(found, answerable(articles), strict=False):
        shown = documents(sample)
        own = {paragraph["context"] for paragraph in article["paragraphs"]}
        assert gold in shown
        assert len(shown) == len(set(shown)) == sample.meta["documents"] > 1
        assert set(shown) <= everything
        if length == 8192:
            assert own <= set(shown)
            assert len(shown) > N_PARAGRAPHS
        elif length == 1024:
            assert set(shown) <= own
        assert set(sample.answers) == set(answers)
        assert sample.evidence == (gold,)
        assert sample.cluster.startswith(article["title"] + "/")  # and the paragraph
        assert sample.text + sample.answer_prefix == (
            f"{INSTRUCTION}\n\nThe following are given documents.\n\n{sample.context}\n\n{INSTRUCTION}\n\nQuestion: {question} "
            "Answer:"
        )
        assert (sample.metric, sample.max_new_tokens) == ("ruler_part", 32)


def test_hotpotqa_shows_its_ten_paragraphs_and_others(ruler_data):
    items = hotpotqa(random.Random(5))
    for sample, item in zip(samples(ruler_data, "ruler-2026/qa_2", 4096, 5), items, strict=False):
        own = [f"{title}\n{''.join(sentences)}" for title, sentences in item["context"]]
        shown = documents(sample)
        assert set(own) < set(shown)
        assert sample.evidence == (own[3], own[7])
        assert sample.answers == (item["answer"],)
        assert sample.cluster == item["_id"]
        assert sample.meta["depths"] == [
            pytest.approx(100 * sample.context.index(piece) / len(sample.context), abs=0.051)
            for piece in sample.evidence
        ]


def test_supporting_paragraphs_stay_where_the_ten_do_not_fit(ruler_data):
    for sample in samples(ruler_data, "ruler-2026/qa_2", 640, 5):
        shown = documents(sample)
        assert set(sample.evidence) <= set(shown)
        assert len(shown) < 10


#: number of documents and place of the gold one, measured on the official generator with seed 42
MEASURED = [(26, 23), (54, 25), (101, 71), (91, 64), (196, 50), (206, 54), (186, 45)]


@pytest.mark.parametrize(("n_documents", "place"), MEASURED)
def test_place_of_the_gold_document_is_the_measured_one(n_documents, place):
    for variant in VARIANTS[:2]:
        numbers = list(range(n_documents))
        assert variant.shuffled(numbers, seeded(42), own_seed=7).index(0) == place
        assert numbers == list(range(n_documents))


def seeded(seed):
    from ruler_support import bpe

    from kvpress_eval.data import Data
    from kvpress_eval.tasks import Request

    return Request(bpe(), Data(), length=4096, seed=seed)


def test_t19_gold_document_of_squad_is_fixed_officially_and_spread_in_posfix(ruler_data):
    def places(family):
        found: dict[int, list[int]] = {}
        for sample in samples(ruler_data, f"{family}/qa_1", 2048, 20):
            shown = documents(sample)
            found.setdefault(len(shown), []).append(shown.index(sample.evidence[0]))
        return found

    for n_documents, found in places("ruler-2026").items():
        order = list(range(n_documents))
        random.Random(42).shuffle(order)
        assert set(found) == {order.index(0)}
    spread = places("ruler-posfix")
    relative = sorted(place / (n_documents - 1) for n_documents, found in spread.items() for place in found)
    assert relative[2] < 0.3
    assert relative[-3] > 0.7
    assert len(set(relative)) > 10


def test_posfix_goes_round_the_articles(ruler_data):
    clusters = [sample.cluster for sample in samples(ruler_data, "ruler-posfix/qa_1", 1024, 16)]
    assert len(set(clusters[:8])) == len(set(clusters[8:])) == 8
    official = samples(ruler_data, "ruler-2026/qa_1", 1024, 16)
    assert len({sample.cluster.split("/")[0] for sample in official}) == 1
    assert len({sample.cluster for sample in official}) == len({sample.evidence for sample in official}) > 1
    asked = [sample.question for sample in samples(ruler_data, "ruler-posfix/qa_2", 1024, 10)]
    assert asked != [sample.question for sample in samples(ruler_data, "ruler-2026/qa_2", 1024, 10)]


def test_a_document_that_is_too_long_is_passed_over(ruler_data, tmp_path, monkeypatch):
    """One paragraph longer than the whole budget must not end the search for fillers."""
    from hashlib import sha256

    from kvpress_eval.data import Data
    from kvpress_eval.data.packages import SHA256

    items = hotpotqa(random.Random(5))
    items[0]["context"][0][1] = ["long " * 3000]
    content = json.dumps(items).encode()
    (tmp_path / "ruler").mkdir()
    (tmp_path / "ruler" / "hotpotqa.json").write_bytes(content)
    monkeypatch.setitem(SHA256, "ruler/hotpotqa.json", sha256(content).hexdigest())
    (sample,) = samples(Data([tmp_path]), "ruler-2026/qa_2", 2048, 1)
    shown = documents(sample)
    assert set(sample.evidence) <= set(shown)
    assert not any("long long" in document for document in shown)


@pytest.mark.parametrize(("task", "content"), [("qa_1", "[1]"), ("qa_2", '[{"question": "?"}]'), ("qa_1", "{")])
def test_a_file_with_other_fields_is_refused(tmp_path, monkeypatch, task, content):
    from hashlib import sha256

    from kvpress_eval.data import Data
    from kvpress_eval.data.packages import SHA256

    name = "ruler/squad.json" if task == "qa_1" else "ruler/hotpotqa.json"
    (tmp_path / "ruler").mkdir()
    (tmp_path / name).write_text(content)
    monkeypatch.setitem(SHA256, name, sha256(content.encode()).hexdigest())
    with pytest.raises(InputError, match=r"has not the expected fields .*kvpress data fetch ruler"):
        samples(Data([tmp_path]), f"ruler-2026/{task}", 2048, 1)
