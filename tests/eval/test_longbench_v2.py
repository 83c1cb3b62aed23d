"""LongBench v2 on small files in the official schema, and reading a large array item by item."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvpress.errors import InputError
from kvpress_eval.data import Data
from kvpress_eval.sample import Sample
from kvpress_eval.scorers import find_scorer
from kvpress_eval.tasks import TASKS, Request
from kvpress_eval.tasks.longbench import stream
from kvpress_eval.tasks.longbench.stream import stream_array


def item(index: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "_id": f"id{index}",
        "domain": "Single-Document QA",
        "sub_domain": "Legal",
        "difficulty": "hard",
        "length": "short",
        "question": " What is $C_A$? \n",
        "choice_A": " one",
        "choice_B": "two $Q$",
        "choice_C": "three",
        "choice_D": "four\n",
        "answer": "B",
        "context": "\n Long text with $Q$ and $DOC$ and {braces}. \n",
    } | changes


def samples(folder: Path, limit: int | None = None) -> list[Sample]:
    return list(TASKS["longbench-v2"].samples(Request(None, Data([folder]), limit=limit)))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPRESS_DATA", str(tmp_path / "none"))


def test_the_prompt_is_the_official_one_with_stripped_fields(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([item()]))
    (sample,) = samples(tmp_path)
    assert sample.text == (
        "Please read the following text and answer the question below.\n\n<text>\n"
        "Long text with $Q$ and $DOC$ and {braces}.\n</text>\n\n"
        "What is the correct answer to this question: What is $C_A$?\nChoices:\n(A) one\n(B) two $Q$\n(C) three\n(D) four\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert sample.context == "Long text with $Q$ and $DOC$ and {braces}."
    assert (sample.metric, sample.max_new_tokens, sample.chat) == ("multiple_choice", 128, True)
    assert sample.meta == {
        "domain": "Single-Document QA",
        "sub_domain": "Legal",
        "difficulty": "hard",
        "length": "short",
    }
    scorer = find_scorer(sample.metric)
    assert scorer("The correct answer is (B)", sample).value == scorer(sample.right_answer, sample).value == 1.0
    assert scorer("The correct answer is (A)", sample).value == scorer("", sample).value == 0.0


def test_the_deviation_from_sampling_is_said_with_every_score() -> None:
    assert "greedily" in TASKS["longbench-v2"].caveat
    assert "empty" in TASKS["longbench-v2"].caveat


def test_documents_make_clusters_and_the_limit_takes_the_first_ones(tmp_path: Path) -> None:
    (tmp_path / "longbench-v2").mkdir()
    contents = [item(0), item(1), item(2, context="other")]
    (tmp_path / "longbench-v2" / "data.json").write_text(json.dumps(contents, indent=2))
    first, second, third = samples(tmp_path)
    assert first.cluster == second.cluster != third.cluster
    assert samples(tmp_path, limit=2) == [first, second]


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"answer": "E"}, "answer"), ({"difficulty": "odd"}, "difficulty"), ({"choice_C": 3}, "choice_C")],
)
def test_wrong_items_are_named(changes: dict[str, Any], field: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([item(), item(1, **changes)]))
    with pytest.raises(InputError, match=rf"item 1 of .*data\.json.*field {field}"):
        samples(tmp_path)


def test_missing_data_names_the_command_that_gets_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="kvpress data fetch longbench-v2"):
        samples(tmp_path)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("indent", [None, 1])
def test_streaming_gives_what_loading_gives(
    chunk: int, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_CHUNK", chunk)
    content = [{"a": "] , [", "b": [1, {"c": None}]}, [], 'é\\"', {}, [[]], {"x": -3.5e2}]
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    (tmp_path / "x.json").write_text(text + "\n", encoding="utf-8")
    assert list(stream_array(tmp_path / "x.json", max_characters=100)) == content


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[", "[{}", "[{},", "[{} {}]", '[{"a": 1]', "[nope]", "[" * 100_000, '["' + "x" * 300 + '"]'],
)
def test_streaming_refuses_what_is_no_array_or_too_long(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_CHUNK", 16)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=r"x\.json"):
        list(stream_array(tmp_path / "x.json", max_characters=200))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'["\xff"]')
    with pytest.raises(InputError, match="no readable JSON"):
        list(stream_array(tmp_path / "x.json", max_characters=200))
