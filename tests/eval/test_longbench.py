"""LongBench v1 and its E splits on small files in the official schema."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from longbench_support import CONTEXT, QUERY, row, samples, write

from kvpress_eval.prompts import load_prompts
from kvpress_eval.scorers import find_scorer
from kvpress_eval.tasks import TASKS, find_tasks

#: metric, tokens to generate, and whether there is a chat template, per set: typed from the benchmark's table
PROTOCOL = {
    "narrativeqa": ("qa_f1", 128, True),
    "qasper": ("qa_f1", 128, True),
    "multifieldqa_en": ("qa_f1", 64, True),
    "multifieldqa_zh": ("qa_f1_zh", 64, True),
    "hotpotqa": ("qa_f1", 32, True),
    "2wikimqa": ("qa_f1", 32, True),
    "musique": ("qa_f1", 32, True),
    "dureader": ("rouge_l_zh", 128, True),
    "gov_report": ("rouge_l", 512, True),
    "qmsum": ("rouge_l", 512, True),
    "multi_news": ("rouge_l", 512, True),
    "vcsum": ("rouge_l_zh", 512, True),
    "trec": ("classification-firstline", 64, False),
    "triviaqa": ("qa_f1-firstline", 32, False),
    "samsum": ("rouge_l-firstline", 128, False),
    "lsht": ("classification-firstline", 64, False),
    "passage_count": ("count", 32, True),
    "passage_retrieval_en": ("retrieval", 32, True),
    "passage_retrieval_zh": ("retrieval_zh", 32, True),
    "lcc": ("code_sim", 64, False),
    "repobench-p": ("code_sim", 64, False),
}
EXTENDED = {
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "gov_report",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "passage_count",
    "passage_retrieval_en",
    "lcc",
    "repobench-p",
}


@pytest.fixture(autouse=True)
def no_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPRESS_DATA", str(tmp_path / "none"))


def test_the_templates_are_the_official_file_byte_by_byte() -> None:
    """Written as JSON again, they have the md5 of LongBench's dataset2prompt.json."""
    official = json.dumps(load_prompts("longbench"), ensure_ascii=False, indent=4)
    assert hashlib.md5(official.encode(), usedforsecurity=False).hexdigest() == "245b942a0be047cc2e87aa34216752b7"


def test_there_are_21_sets_and_13_extended_ones() -> None:
    assert {task.name for task in find_tasks("longbench")} == {f"longbench/{name}" for name in PROTOCOL}
    assert {task.name for task in find_tasks("longbench-e")} == {f"longbench-e/{name}_e" for name in EXTENDED}


@pytest.mark.parametrize("name", PROTOCOL)
def test_t16_every_set_has_its_official_metric_length_and_chat_rule(name: str, tmp_path: Path) -> None:
    write(tmp_path / "longbench" / f"{name}.jsonl", row(name))
    (sample,) = samples(tmp_path, f"longbench/{name}")
    assert (sample.metric, sample.max_new_tokens, sample.chat) == PROTOCOL[name]
    assert sample.stop_at_newline == (name == "samsum")
    assert sample.answer_prefix == ""
    assert sample.id == row(name)["_id"]


@pytest.mark.parametrize("name", PROTOCOL)
def test_the_joined_segments_are_the_official_prompt(name: str, tmp_path: Path) -> None:
    write(tmp_path / f"{name}.jsonl", row(name))
    (sample,) = samples(tmp_path, f"longbench/{name}")
    # the official code formats; braces in the data are safe there because only the template is parsed
    assert sample.text == load_prompts("longbench")[name].format(context=CONTEXT, input=QUERY)
    assert sample.context == CONTEXT


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "gov_report",
            "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n"
            f"{CONTEXT}\n\nNow, write a one-page summary of the report.\n\nSummary:",
        ),
        (
            "trec",
            "Please determine the type of the question below. Here are some examples of questions.\n\n"
            f"{CONTEXT}\n{QUERY}",
        ),
        ("lcc", f"Please complete the code given below. \n{CONTEXT}Next line of code:\n"),
        ("repobench-p", f"Please complete the code given below. \n{CONTEXT}{QUERY}Next line of code:\n"),
        ("multifieldqa_zh", None),
    ],
)
def test_whole_frames(name: str, expected: str | None, tmp_path: Path) -> None:
    write(tmp_path / f"{name}.jsonl", row(name))
    (sample,) = samples(tmp_path, f"longbench/{name}")
    if expected is None:
        expected = (
            f"阅读以下文字并用中文简短回答：\n\n{CONTEXT}\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，"
            f"不要输出任何其他字词。\n\n问题：{QUERY}\n回答："
        )
    assert sample.text == expected


def test_t3_t8_odd_spots_of_the_frames_are_kept(tmp_path: Path) -> None:
    for name in ("qasper", "narrativeqa", "passage_count", "passage_retrieval_en", "multi_news"):
        write(tmp_path / f"{name}.jsonl", row(name))
    qasper, narrative, count, retrieval, news = (
        samples(tmp_path, f"longbench/{name}")[0]
        for name in ("qasper", "narrativeqa", "passage_count", "passage_retrieval_en", "multi_news")
    )
    assert qasper.question.startswith("\n\n Answer the question based on the above article as concisely as you can")
    assert qasper.lead.startswith("You are given a scientific article and a question.")  # not hotpotqa's prompt
    assert qasper.lead.endswith("\n\nArticle: ")
    assert narrative.text.count("asconcisely as you can") == 2
    assert count.question.endswith("\n\nThe final answer is: ")
    assert retrieval.question.endswith('"Paragraph 2", etc.\n\nThe answer is: ')
    assert news.lead.endswith("Write a one-page summary of all news. \n\nNews:\n")


def test_t7_the_frame_is_there_once_and_the_cue_stays_in_the_question(tmp_path: Path) -> None:
    write(tmp_path / "trec.jsonl", row("trec", input="Question: Who?\nType:"))
    write(tmp_path / "hotpotqa.jsonl", row("hotpotqa"))
    (trec,) = samples(tmp_path, "longbench/trec")
    assert trec.text.endswith("\nQuestion: Who?\nType:")
    (hotpot,) = samples(tmp_path, "longbench/hotpotqa")
    assert hotpot.text.count("The following are given passages.") == 1
    assert "\\n" not in hotpot.lead + hotpot.question


def test_t14_only_the_context_is_between_the_borders(tmp_path: Path) -> None:
    """Truncation takes ids out of `context`; neither the instructions nor the query are in it."""
    write(tmp_path / "musique.jsonl", row("musique", context="X" * 1000))
    (sample,) = samples(tmp_path, "longbench/musique")
    assert sample.context == "X" * 1000
    assert "XX" not in sample.lead + sample.question
    assert QUERY in sample.question


@pytest.mark.parametrize("name", PROTOCOL)
def test_a_perfect_answer_scores_one_and_an_empty_one_zero_on_every_set(name: str, tmp_path: Path) -> None:
    write(tmp_path / f"{name}.jsonl", row(name))
    (sample,) = samples(tmp_path, f"longbench/{name}")
    scorer = find_scorer(sample.metric)
    assert scorer(sample.answers[0], sample).value == pytest.approx(1.0, abs=1e-7)
    assert scorer("", sample).value == 0.0


def test_first_line_sets_ignore_what_follows(tmp_path: Path) -> None:
    for name in ("trec", "triviaqa", "samsum", "lsht"):
        write(tmp_path / f"{name}.jsonl", row(name))
        (sample,) = samples(tmp_path, f"longbench/{name}")
        prediction = f"\n{sample.answers[0]}\nCity City City"
        assert find_scorer(sample.metric)(prediction, sample).value == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize("name", sorted(EXTENDED))
def test_the_extended_split_has_its_own_file_family_and_buckets(name: str, tmp_path: Path) -> None:
    contents = [row(name, index, length=length) for index, length in enumerate((3999, 4000, 7999, 8000))]
    write(tmp_path / f"{name}_e.jsonl", *contents)
    found = samples(tmp_path, f"longbench-e/{name}_e")
    assert [sample.meta["bucket"] for sample in found] == ["0-4k", "4-8k", "4-8k", "8k+"]
    assert found[0].metric == PROTOCOL[name][0]
    assert TASKS[f"longbench-e/{name}_e"].family == "longbench-e"


def test_t18_floor_and_chinese_sets_stay_out_of_the_macro_score() -> None:
    macro = {task.name.removeprefix("longbench/") for task in find_tasks("longbench") if task.in_macro}
    chinese = {"multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"}
    assert macro == set(PROTOCOL) - chinese - {"passage_count"}
    assert not TASKS["longbench-e/passage_count_e"].in_macro
    assert all(task.caveat for task in find_tasks("longbench") if not task.in_macro)


def test_items_of_one_document_share_a_cluster(tmp_path: Path) -> None:
    contents = [row("qasper", 0), row("qasper", 1), row("qasper", 2, context="another")]
    write(tmp_path / "qasper.jsonl", *contents)
    first, second, third = samples(tmp_path, "longbench/qasper")
    assert first.cluster == second.cluster != third.cluster


def test_ids_stay_apart_and_the_limit_takes_the_first_ones(tmp_path: Path) -> None:
    write(tmp_path / "qasper.jsonl", *[row("qasper", 0, input=str(index)) for index in range(3)], row("qasper", 1))
    found = samples(tmp_path, "longbench/qasper")
    assert len({sample.id for sample in found}) == 4
    assert samples(tmp_path, "longbench/qasper", limit=2) == found[:2]


def test_evidence_is_what_the_context_holds_literally(tmp_path: Path) -> None:
    answers = ["Paris", "330", "the tower of Rome", "tower of Paris"]
    write(tmp_path / "hotpotqa.jsonl", row("hotpotqa", answers=answers))
    write(tmp_path / "triviaqa.jsonl", row("triviaqa", answers=answers))
    assert samples(tmp_path, "longbench/hotpotqa")[0].evidence == ("Paris", "tower of Paris")
    assert samples(tmp_path, "longbench/triviaqa")[0].evidence == ()  # its passage is in the query
