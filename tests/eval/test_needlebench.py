"""NeedleBench v2 against a plain re-derivation: bytes stand for cl100k tokens, and the global generator is seeded as the
original does it."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from itertools import islice

import pytest

from kvpress.errors import InputError
from kvpress_eval.data import Data
from kvpress_eval.data.needlebench import SHA256, fetch_needlebench
from kvpress_eval.data.packages import CL100K
from kvpress_eval.data.packages import SHA256 as PACKAGES_SHA256
from kvpress_eval.scorers import find_scorer
from kvpress_eval.tasks import TASKS, Request
from kvpress_eval.tasks.needlebench.grid import diagonal
from kvpress_eval.tasks.needlebench.needles import Needle, combined_question, draw_distinct, read_needles
from kvpress_eval.tasks.needlebench.v2 import PROTOCOLS, MultiReasoning

ENGLISH = [
    {
        "language": "English",
        "arg1": f"Isle{i}",
        "arg2": f"Gem{i:02}x",
        "needle": f"Hidden on Isle{i} Island is the legendary Gem{i:02}x.",
        "retrieval_question": f"What legendary item is hidden on Isle{i} Island? Please answer in the format 'The legendary "
        f"item hidden on the Isle{i} Island is ______.'",
    }
    for i in range(15)
]
CHINESE = [
    {
        "language": "Chinese",
        "arg1": f"岛{i}",
        "arg2": f"宝石{i:02}号",
        "needle": f"隐藏在岛{i}上的传说是宝石{i:02}号。",
        "retrieval_question": f"隐藏在岛{i}上的是什么？请按照'隐藏在岛{i}上的是______。'的格式回答。",
    }
    for i in range(12)
]
ESSAYS = [" ".join(f"essay{n}word{i}" for i in range(400)) for n in range(7)]
NAMES = [f"Person{i:03} Family{i % 7}" for i in range(700)]
HAYSTACK_TASKS = [
    name for name, task in TASKS.items() if task.family.startswith("needlebench-v2") and task.needs_length
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "needlebench").mkdir()
    (folder / "tiktoken").mkdir()
    rows = [row for pair in zip(ENGLISH, [*CHINESE, *ENGLISH[:3]], strict=True) for row in pair]
    files = {
        "needlebench/needles.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "needlebench/names.json": json.dumps({"English": ",".join(NAMES), "Chinese": ",".join(NAMES)}),
        "needlebench/PaulGrahamEssays.jsonl": "\n".join(json.dumps({"text": text}) for text in ESSAYS) + "\n",
        "needlebench/zh_finance.jsonl": "\n".join(json.dumps({"text": "金融新闻。" * 500}) for _ in range(4)),
        CL100K: "\n".join(f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def known_files(folder, monkeypatch):
    for name in SHA256:
        monkeypatch.setitem(SHA256, name, sha256(folder / "needlebench" / name))
    monkeypatch.setitem(PACKAGES_SHA256, CL100K, sha256(folder / CL100K))


@pytest.fixture
def ask(folder, tokenizer):
    def samples(name, length=4000, limit=None, seed=42):
        request = Request(tokenizer, Data([folder]), length=length, limit=limit, seed=seed)
        return list(TASKS[name].samples(request))

    return samples


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def original_haystack(repeat, n):
    """Bytes of the essays as the original orders them: one list, shuffled again and again by the global generator."""
    state = random.getstate()
    lines = list(ESSAYS)
    for seed in range(repeat + 1):
        random.seed(seed)
        random.shuffle(lines)
    random.setstate(state)
    return "".join(lines)[:n]


@pytest.mark.parametrize("repeat", [0, 1, 4])
@pytest.mark.parametrize("depth", [0, 30, 100])
def test_single_needle_is_where_the_original_puts_it(ask, repeat, depth):
    [sample] = [s for s in ask("needlebench-v2/s_rt", length=6000) if s.id == f"repeat-{repeat}-depth-{depth}"]
    state = random.getstate()
    random.seed(repeat)
    rows = [row for pair in zip(ENGLISH, [*CHINESE, *ENGLISH[:3]], strict=True) for row in pair]
    row = random.choice([row for row in rows if row["language"] == "English"])
    random.setstate(state)
    needle = "\n" + row["needle"] + "\n"
    haystack = original_haystack(repeat, 6000 - 3000 - len(needle))
    cut = int(len(haystack) * (depth / 100))
    assert sample.context == haystack[:cut] + needle + haystack[cut:]
    assert sample.answers == (row["arg2"],)
    assert sample.evidence == (row["needle"],)
    assert sample.meta["haystack_tokens"] == len(haystack)
    assert sample.text == (
        "This is a test of long-text capability. You need to first read the long document below, and then answer the final "
        "question based on the information in the document.\nThe content of the long document is as follows\n\n<Document>\n"
        f"{sample.context}\n</Document>\n\nBased on the information in the document, now please answer: "
        f"{row['retrieval_question']}\n"
    )


def test_eleven_needles_are_where_the_original_puts_them(ask):
    samples = ask("needlebench-v2-8k/m_rt", length=4000)
    assert len(samples) == 25
    for repeat in (0, 7):
        sample = samples[repeat]
        needles = [f"\n{text}\n" for text in sample.evidence]
        haystack = original_haystack(repeat, 4000 - 500 - sum(map(len, needles)))
        expected, done = "", 0
        for needle, depth in zip(needles, range(0, 101, 10), strict=True):
            cut = int(len(haystack) * (depth / 100))
            expected, done = expected + haystack[done:cut] + needle, cut
        assert sample.context == expected + haystack[done:]
        assert sample.meta["depths"] == list(range(0, 101, 10))
        assert len(sample.context) == 3500


def test_every_repeat_shuffles_the_same_eleven_needles_with_its_own_seed(ask):
    samples = ask("needlebench-v2/m_rt", length=6000)
    ids = [sample.meta["needles"] for sample in samples]
    assert len({frozenset(row) for row in ids}) == 1
    order = list(range(11))
    random.Random(0).shuffle(order)
    drawn = [name for _, name in sorted(zip(order, ids[0], strict=True))]  # undoes the shuffle of repeat 0
    random.Random(9).shuffle(drawn)
    assert ids[9] == drawn
    rows = {row["arg2"] for row in ENGLISH}
    assert set(samples[0].answers) <= rows
    assert len(set(samples[0].answers)) == 11


def test_needles_depend_on_the_length_in_v2_and_on_the_seed_alone_when_fixed(ask):
    def needles(family, length, seed):
        return set(ask(f"{family}/m_rt", length, 1, seed)[0].meta["needles"])

    lengths, seeds = range(4000, 6000, 500), range(5)
    assert len({frozenset(needles("needlebench-v2-8k", length, 0)) for length in lengths}) > 1
    assert len({frozenset(needles("needlebench-v2-8k-fixed", length, 0)) for length in lengths}) == 1
    assert len({frozenset(needles("needlebench-v2-8k-fixed", 4000, seed)) for seed in seeds}) > 1


def test_combined_question_has_the_original_comma_and_no_space_before_the_request():
    needles = [
        Needle("0", "A", "X", "", "What is on A? Really? Please answer in the format 'On the A is ______. Or so.'"),
        Needle("1", "B", "Y", "", "Who rules B? Please answer in the format 'B is ruled by ______.'"),
    ]
    assert combined_question(needles, "English") == (
        "What is on A?、Who rules B?Please answer in the format of 'On the A is ______、B is ruled by ______'"
    )


def test_chinese_frame_and_combined_question(ask):
    sample = ask("needlebench-v2-zh/m_rt", length=9000, limit=1)[0]
    first, second = (re.search(r"岛(\d+)上", text)[1] for text in sample.evidence[:2])
    assert sample.lead == (
        "这是一个长文本能力的测试，你需要首先阅读下面的长文档，然后根据文档中的信息，依次回答最后的问题。\n长文档的内容如下\n\n<文档>\n"
    )
    assert sample.question.startswith(
        f"\n</文档>\n\n根据文档中的信息，现在请问：隐藏在岛{first}上的是什么？、隐藏在岛{second}上的是什么？"
    )
    assert f"？请按照'隐藏在岛{first}上的是______、隐藏在岛{second}上的是______" in sample.question
    assert sample.question.endswith("______'的格式回答。\n")


@pytest.mark.parametrize("kind", ["s_rt", "m_rt", "m_rs"])
def test_length_up_to_the_buffer_is_an_empty_haystack_or_refused(ask, kind):
    sample = ask(f"needlebench-v2/{kind}", length=1000, limit=1)[0]
    assert sample.meta["haystack_tokens"] == 0
    assert sample.context == "".join(f"\n{text}\n" for text in sample.evidence)
    assert "empty haystack" in TASKS[f"needlebench-v2/{kind}"].caveat
    with pytest.raises(InputError, match="no room for a haystack"):
        ask(f"needlebench-v2-fixed/{kind}", length=1000, limit=1)


def test_essays_that_are_too_short_are_an_error(ask):
    with pytest.raises(InputError, match="lower the length"):
        ask("needlebench-v2/s_rt", length=100_000, limit=1)


@pytest.mark.parametrize(
    ("depth", "original", "fixed"),
    # 1,000 tokens of haystack and facts of 10, 20 and 30 tokens; worked out by hand from the loops of multi.py
    [(50, [500, 620, 760], [500, 610, 730]), (95, [950, 1020, 1060], [950, 1010, 1030])],
)
def test_facts_are_pushed_back_twice_in_v2_and_once_when_fixed(depth, original, fixed):
    places = {p.fixed: MultiReasoning(p).places(1000, [10, 20, 30], [depth] * 3) for p in PROTOCOLS[:2]}
    assert places == {False: original, True: fixed}


def test_multi_reasoning_asks_for_the_eldest_of_the_chain(ask):
    sample = ask("needlebench-v2-8k/m_rs", length=4000, limit=3)[2]
    assert sample.meta == {
        "depth": 20,
        "facts": 4,
        "length": 4000,
        "repeat": 0,
        "haystack_tokens": sample.meta["haystack_tokens"],
    }
    state = random.getstate()
    random.seed(0)
    people = random.sample(NAMES, 5)
    random.setstate(state)
    assert sample.answers == (people[0],)
    assert (
        f"who is the eldest relative that '{people[-1]}' can trace back to in the context?\n\nFor example:"
        in sample.question
    )
    assert sample.question.endswith(
        f"\"So the oldest relative '{people[-1]}' can trace back to in the provided text is \\boxed{{(your answer here)}}.\"\n\n"
    )
    assert len(sample.context) == 3500


def ends(facts):
    """The two ends of the path that facts about two people each make, and the generations between them."""
    links = [set(re.findall(r"Person\d+ Family\d", fact)) for fact in facts]
    assert all(len(link) == 2 for link in links)
    people = [person for link in links for person in link]
    return {person for person in people if people.count(person) == 1}, sum(
        2 if "grand" in fact else 1 for fact in facts
    )


def test_ancestral_trace_grid_answers_and_seeds(ask):
    samples = ask("needlebench-v2/atc", length=None)
    assert len(samples) == 9 * 4 * 10
    assert len({sample.id for sample in samples}) == 360
    assert {(s.meta["facts"], s.meta["question"]) for s in samples[:36]} == {
        (2**k, kind)
        for k in range(1, 10)
        for kind in ("eldest_ancestor", "nth_ancestor", "nth_descendant", "relationship_distance")
    }
    for sample in samples[::7]:
        both, generations = ends(sample.evidence)
        assert len(sample.evidence) == sample.meta["facts"]
        assert sample.context == "".join(sample.evidence)
        kind = sample.meta["question"]
        state = random.getstate()
        kinds = ["eldest_ancestor", "nth_ancestor", "nth_descendant", "relationship_distance"]
        random.seed(sample.meta["repeat"] + 1 + 10_000 * kinds.index(kind))
        people = random.sample(NAMES, sample.meta["facts"] + 1)
        random.setstate(state)
        assert both == {people[0], people[-1]}
        if kind == "relationship_distance":
            assert sample.answers == (str(generations),)
        else:
            assert sample.answers == (people[-1] if kind == "nth_descendant" else people[0],)
        if kind.startswith("nth"):
            asked = people[0] if kind == "nth_descendant" else people[-1]
            assert f"who is the {generations}th generation {kind[4:]} of '{asked}'?\n" in sample.question


@pytest.mark.parametrize("name", [*HAYSTACK_TASKS, "needlebench-v2/atc", "needlebench-v2-fixed/atc"])
def test_perfect_answer_scores_one_and_an_empty_one_zero(ask, name):
    for sample in ask(name, length=8000, limit=12):
        score = find_scorer(sample.metric)
        assert score(sample.right_answer, sample).value == 1
        assert score("", sample).value == 0
        assert all(text in sample.context for text in sample.evidence)


def test_score_of_eleven_needles_is_the_mean_of_its_depths(ask):
    sample = ask("needlebench-v2/m_rt", length=6000, limit=1)[0]
    score = find_scorer("needle_parallel")(" and ".join(sample.answers[2:6]), sample)
    assert score.value == pytest.approx(4 / 11)
    assert len(score.parts) == 11
    assert sum(score.parts.values()) / 11 == pytest.approx(score.value)


@pytest.mark.parametrize("name", HAYSTACK_TASKS)
def test_samples_are_repeatable_and_a_limit_takes_the_first(ask, name):
    first = ask(name, length=6000, limit=6)
    assert first == ask(name, length=6000, limit=6)
    assert first[:2] == ask(name, length=6000, limit=2)
    assert len({sample.id for sample in first}) == len(first)


def test_a_limit_is_balanced_over_depths_and_facts(ask):
    assert sorted(s.meta["depth"] for s in ask("needlebench-v2/s_rt", 6000, 11)) == list(range(0, 101, 10))
    facts = [s.meta["facts"] for s in ask("needlebench-v2/m_rs", 6000, 11)]
    assert {facts.count(n) for n in (2, 3, 4, 5)} == {2, 3}
    assert len({(s.meta["depth"], s.meta["facts"]) for s in ask("needlebench-v2/m_rs", 6000, 44)}) == 44
    assert sorted(diagonal("abc", [1, 2])) == [(letter, n) for letter in "abc" for n in (1, 2)]


def test_global_generator_is_left_alone(ask):
    random.seed(5)
    expected = random.Random(5).random()
    ask("needlebench-v2/m_rt", 6000, 2)
    assert random.random() == expected


def test_clusters_are_the_repeats(ask):
    samples = ask("needlebench-v2/s_rt", 6000)
    assert len(samples) == 110
    assert {sample.cluster for sample in samples} == {f"repeat-{repeat}" for repeat in range(10)}
    for repeat in range(10):
        assert len({s.answers for s in samples if s.cluster == f"repeat-{repeat}"}) == 1


def test_needles_that_share_a_name_are_not_drawn_together():
    needles = [Needle(str(i), f"a{i // 2}", f"b{i % 9}", "", "") for i in range(18)]
    for seed in range(20):
        drawn = draw_distinct(needles, 5, random.Random(seed))
        assert len({needle.arg1 for needle in drawn}) == len({needle.arg2 for needle in drawn}) == 5
    with pytest.raises(InputError, match="distinct names"):
        draw_distinct(needles, 10, random.Random(0))


def test_needle_ids_are_row_numbers(folder):
    ids = [needle.id for needle in read_needles(folder / "needlebench" / "needles.jsonl", "English")]
    assert ids[:3] == ["0", "2", "4"]


def test_broken_needles_are_named(tmp_path):
    (tmp_path / "needles.jsonl").write_text('{"language": "English"}\n')
    with pytest.raises(InputError, match="line 1 is no needle"):
        read_needles(tmp_path / "needles.jsonl", "English")


def test_missing_or_wrong_files_name_the_command(tmp_path, tokenizer, folder, monkeypatch):
    monkeypatch.setenv("KVPRESS_DATA", str(tmp_path))
    samples = TASKS["needlebench-v2/atc"].samples(Request(tokenizer, Data()))
    with pytest.raises(InputError, match="kvpress data fetch needlebench"):
        next(samples)
    monkeypatch.setitem(SHA256, "names.json", "0" * 64)
    with pytest.raises(InputError, match="not the file this task was checked with"):
        next(islice(TASKS["needlebench-v2/atc"].samples(Request(tokenizer, Data([folder]))), 1))


def test_length_is_needed(ask):
    with pytest.raises(InputError, match="needs a length"):
        ask("needlebench-v2/s_rt", length=None)


def test_fetch_takes_what_is_right_and_refuses_what_is_not(folder, tmp_path, monkeypatch):
    import huggingface_hub

    def download(repository, name, repo_type):
        assert (repository, repo_type) == ("opencompass/NeedleBench", "dataset")
        return str(folder / "needlebench" / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    paths = fetch_needlebench(tmp_path)
    assert [path.name for path in paths] == list(SHA256)
    assert all(sha256(path) == SHA256[path.name] for path in paths)

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert fetch_needlebench(tmp_path) == paths
    paths[0].write_text("cut")
    with pytest.raises(InputError, match="needlebench-recipe"):
        fetch_needlebench(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: str(paths[0]))
    with pytest.raises(InputError, match="another version"):
        fetch_needlebench(tmp_path)
