"""Stand-ins: built from tiny sources of the real formats, and run as tasks."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from kvpress.errors import InputError
from kvpress_eval.data import Data
from kvpress_eval.data.packages import SHA256
from kvpress_eval.data.standins import STANDINS, build_standins, cluster_of, debsection, sources
from kvpress_eval.data.standins.renaming import renamed
from kvpress_eval.data.standins.stdlib_next import code_lines
from kvpress_eval.scorers import find_scorer
from kvpress_eval.tasks import TASKS, Request

FIELDS = {"input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"}
ITEMS = 40
N_ARTICLES = 33
LIBRARY = {
    "alone.py": "import os\n\n\ndef first_thing(value):\n"
    '    """Words in a string that look = like code(here)\n    second line = of the string()\n    """\n'
    + "".join(f"    number_{i} = first_thing(value, {i})\n" for i in range(150)),
    "pack/__init__.py": "",
    "pack/base.py": "# nothing\n" * 30
    + "class BaseCodec:\n    kind = 'base'\n\n\ndef shared_helper(x):\n    return x\n",
    "pack/user.py": "from .base import BaseCodec, shared_helper\n"
    + "".join(f"plain_{i} = list(range({i}))\n" for i in range(40))
    + "value_of_it = shared_helper(plain_1)\nclass Mine(BaseCodec):\n    pass\nother_value = BaseCodec()\n",
    "test/skipped.py": "must_not_be_read = shared_helper(1)\n" * 50,
}


def squad():
    rng = random.Random(7)
    data = []
    for a in range(N_ARTICLES):
        paragraphs = []
        for p in range(8):
            fact = f"answer{a}x{p}"
            words = [rng.choice(["ash", "elm", "fir", "oak", "yew"]) for _ in range(60)]
            text = f"Article {a} paragraph {p} says\nthat the secret is {fact}. " + " ".join(words)
            answered = {
                "question": f" What is secret {p} of article {a}? ",
                "answers": [{"text": fact}, {"text": fact}, {"text": f"is {fact}"}],
            }
            unanswerable = {"question": "Nobody knows?", "answers": [], "plausible_answers": [{"text": "x"}]}
            paragraphs.append({"context": text, "qas": [unanswerable, *([answered] if p else [])]})
        data.append({"title": f"Article_{a}", "paragraphs": paragraphs})
    return {"version": "tiny", "data": data}


def hotpotqa():
    rows = []
    for i in range(60):
        paragraphs = [[f"Title {i} {p}", [f"Text {i} {p} one.", " Two words " * 30]] for p in range(10)]
        paragraphs[3][1][0] = f"The town of query{i} lies here, yes."
        rows.append(
            {
                "_id": f"id{i}",
                "question": f"Where is query{i}?",
                "answer": "yes" if i % 10 == 0 else f"query{i}",
                "supporting_facts": [[f"Title {i} 3", 0], [f"Title {i} 7", 1]],
                "context": paragraphs,
            }
        )
    return rows


def country(n):
    name = f"{'ABCDEFGH'[n]}land"
    facts = {f"Fact {k}": {"text": f"<p>value{n}z{k} units</p>"} for k in range(30)}
    return {
        "Government": {
            "Country name": {"conventional short form": {"text": name}},
            "Motto": {"text": "same everywhere"},
        },
        "Economy": {**facts, "Deep": {"inner": {"text": f"deep{n} thing"}}, "Long": {"text": "word " * 100}},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "ruler").mkdir()
    (folder / "ruler" / "squad.json").write_text(json.dumps(squad()))
    (folder / "ruler" / "hotpotqa.json").write_text(json.dumps(hotpotqa()))
    for n in range(8):
        path = folder / "factbook" / ("one" if n % 2 else "two") / f"c{n}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(country(n)))
    for name, text in LIBRARY.items():
        path = folder / "library" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    script = folder / "bin" / "apt-cache"
    script.parent.mkdir()
    stanzas = [
        f"Package: p{i}-{s}\nSection: {s}\nDescription: tool {i} for {s.upper()} people\n more: text\n"
        for s in ("libs", "oldlibs", "games", "mail", "contrib/net", "rare")
        for i in range(2 if s == "rare" else 70)
    ]
    (folder / "index").write_text("\n".join(stanzas))
    script.write_text(f"#!/bin/sh\ncat '{folder}/index'\n")
    script.chmod(0o755)
    return folder


def use(folder, monkeypatch):
    """Have the builder take the tiny sources for the published ones."""
    monkeypatch.setenv("KVPRESS_DATA", str(folder / "nowhere"))
    for name in ("squad", "hotpotqa"):
        digest = hashlib.sha256((folder / "ruler" / f"{name}.json").read_bytes()).hexdigest()
        monkeypatch.setitem(SHA256, f"ruler/{name}.json", digest)
    files = sorted((folder / "factbook").rglob("*.json"), key=lambda path: path.relative_to(folder).as_posix())
    monkeypatch.setattr(sources, "FACTBOOK_SHA256", sources.folder_sha256(folder / "factbook", files))
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(folder / "library"))
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=":")


@pytest.fixture(autouse=True)
def tiny_sources(folder, monkeypatch):
    use(folder, monkeypatch)


@pytest.fixture(scope="module")
def built(folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        use(folder, patch)
        return build_standins(tmp_path_factory.mktemp("built"), Data([folder]), seed=5, items=ITEMS)


@pytest.fixture
def rows(built):
    return lambda name: [json.loads(line) for line in (built / f"standin_{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("standin", STANDINS, ids=lambda standin: standin.name)
def test_rows_have_the_official_schema(standin, rows):
    found = rows(standin.name.removeprefix("standin_"))
    assert 10 <= len(found) <= ITEMS
    for row in found:
        assert set(row) == FIELDS
        assert row["dataset"] == standin.name
        assert re.fullmatch("[0-9a-f]{48}", row["_id"])
        assert isinstance(row["answers"], list)
        assert row["answers"]
        assert row["length"] == len(" ".join([row["input"], row["context"], *row["answers"]]).split())
        assert row["language"] == ("python" if standin.like in ("lcc", "repobench-p") else "en")
        assert (row["all_classes"] is None) == (standin.like != "trec")
    assert len({row["_id"] for row in found}) == len(found)


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(built, folder, tmp_path):
    one, two = (build_standins(tmp_path / name, Data([folder]), seed=5, items=6) for name in "ab")
    other = build_standins(tmp_path / "c", Data([folder]), seed=6, items=6)
    names = [f"{standin.name}.jsonl" for standin in STANDINS]
    assert sorted(path.name for path in one.iterdir()) == sorted([*names, "MANIFEST.json"])
    for name in (*names, "MANIFEST.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
        assert (one / name).read_bytes() != (other / name).read_bytes()
    for name in names:
        assert (one / name).read_text().splitlines() == (built / name).read_text().splitlines()[:6]


def test_manifest_says_what_the_sets_are_made_of(built):
    manifest = json.loads((built / "MANIFEST.json").read_text())
    assert manifest["seed"] == 5
    assert list(manifest["sets"]) == [standin.name for standin in STANDINS]
    for standin in STANDINS:
        entry = manifest["sets"][standin.name]
        lines = (built / f"{standin.name}.jsonl").read_text().splitlines()
        assert entry["sha256"] == hashlib.sha256((built / f"{standin.name}.jsonl").read_bytes()).hexdigest()
        assert entry["items"] == len(lines)
        assert entry["clusters"] == len({json.loads(line)["_id"][:8] for line in lines})
        assert entry["caveat"]
        for source in entry["sources"]:
            assert len(source["sha256"]) == 64
            assert source["package"]
            assert source["version"]
            assert source["licence"]


def test_article_is_whole_and_articles_take_turns(rows):
    found = rows("squad_article")
    assert len({row["_id"][:8] for row in found[:N_ARTICLES]}) == N_ARTICLES
    for row in found:
        article = re.search(r"of article (\d+)", row["input"])[1]
        assert row["context"].count("\n\n") == 7
        assert row["context"].count(f"Article {article} paragraph") == 8
        assert row["answers"][0] in row["context"]
        assert len(row["answers"]) == len(set(row["answers"])) == 2
        assert row["input"] == row["input"].strip()
    assert {row["input"] for row in found} == {row["input"] for row in rows("squad_article_1k")}


def test_short_article_keeps_the_answer_at_changing_places(built, folder, tmp_path, monkeypatch, rows):
    from kvpress_eval.data.standins.squad_article import around

    article = sources.Sources(Data([folder])).squad[3]
    places = Counter()
    for seed in range(60):
        shown = around(article, 4, 220, random.Random(seed))
        assert article[4] in shown
        assert sum(len(paragraph.text.split()) for paragraph in shown) <= 220
        first = article.index(shown[0])
        assert shown == article[first : first + len(shown)]
        places[shown.index(article[4])] += 1
    assert len(places) >= 3


def test_documents_hold_the_needed_ones_and_fill_the_words(rows):
    by_size = {size: rows(f"hotpot_docs_{size}k") for size in (1, 4, 9, 16)}
    assert len({tuple(row["input"] for row in found) for found in by_size.values()}) == 1
    gold_places = set()
    for size, found in by_size.items():
        for row in found:
            number = re.search(r"query(\d+)", row["input"])[1]
            assert row["answers"] == [f"query{number}"]  # never yes or no
            heads = re.findall(r"^Passage (\d+):\n(.*)$", row["context"], re.MULTILINE)
            assert [int(i) for i, _ in heads] == list(range(1, len(heads) + 1))
            titles = [title for _, title in heads]
            assert len(set(titles)) == len(titles)
            assert {f"Title {number} 3", f"Title {number} 7"} <= set(titles)
            n_words = len(row["context"].split())
            assert 1000 * size - 100 <= n_words <= 1000 * size
            gold_places.add(titles.index(f"Title {number} 3"))
    assert len(gold_places) > 10


def test_examples_are_of_other_articles(rows):
    for row in rows("squad_fewshot_1k"):
        article = re.search(r"of article (\d+)", row["input"])[1]
        assert row["input"].startswith("Passage:\nArticle ")
        assert row["input"].endswith("?\nAnswer:")
        assert row["answers"][0] in row["input"]
        examples = re.findall(
            r"Passage:\nArticle (\d+) .*\nQuestion:\n.*of article (\d+)\?\nAnswer:\nanswer(\d+)x\d+\n", row["context"]
        )
        assert len(examples) == row["context"].count("Passage:") >= 8
        assert all(len(set(example)) == 1 and example[0] != article for example in examples)
        assert len(row["context"].split()) <= 1000


def test_retrieved_paragraph_is_the_one_with_the_answer(rows):
    for row in rows("passage_retrieval"):
        secret, article = re.search(r"secret (\d+) of article (\d+)", row["input"]).groups()
        paragraphs = row["context"].split("\n\n")
        assert len(paragraphs) == 30
        assert len({re.search(r"Article (\d+)", text)[1] for text in paragraphs}) == 30
        number = int(row["answers"][0].removeprefix("Paragraph "))
        assert paragraphs[number - 1].startswith(f"Paragraph {number}: Article {article} paragraph {secret} ")


def test_count_is_that_of_different_paragraphs(rows):
    counts = set()
    for row in rows("passage_count"):
        paragraphs = [text.split(": ", 1)[1] for text in row["context"].split("\n\n")]
        assert len(paragraphs) == 20
        assert row["answers"] == [str(len(set(paragraphs)))]
        counts.add(row["answers"][0])
    assert len(counts) > 5
    assert not TASKS["standin/standin_passage_count"].in_macro


@pytest.mark.parametrize("name", ["factbook_kv", "factbook_kv_1k"])
def test_fact_is_in_its_country_and_nowhere_else(name, rows):
    for row in rows(name):
        field, land = re.fullmatch(r'What is given as "(.*)" for (\w+)\?', row["input"]).groups()
        countries = dict(re.findall(r"Country: (\w+)\n((?:.+\n?)+)", row["context"]))
        assert len(countries) == 5
        assert f"{field}: {row['answers'][0]}" in countries[land].split("\n")
        assert row["context"].count(row["answers"][0]) == 1
        assert "<p>" not in row["context"]
        assert "word word" not in row["context"]
        assert len(row["context"].split()) <= 1000 * (1 if name.endswith("1k") else 4)
    assert {row["_id"][:8] for row in rows(name)[:8]} == {row["_id"][:8] for row in rows(name)}


def test_next_line_is_the_next_line(rows):
    for row in rows("stdlib_next_400"):
        [answer] = row["answers"]
        assert any(f"{row['context']}{answer}\n" in text for text in LIBRARY.values())
        assert "must_not_be_read" not in row["context"]
        assert 100 <= len(row["context"].split()) <= 400
        assert row["context"].endswith("\n")
        assert 15 <= len(answer.strip()) <= 90


def test_lines_of_code_are_neither_strings_nor_comments_nor_of_odd_length():
    text = (
        "x = 1\n"  # 0 too short
        "# a comment of some length\n"
        'name = """text that goes on = and(on)\n'  # 2 begins as code
        "inside = of_the_string(1)\n"
        'end of it""" + "and some more"\n'
        '"""a docstring = that(looks)"""\n'
        "call_me(\n"
        "    with_arguments, and_more,\n"  # 7
        ")\n"
        "long_enough = (1, 2, 3)  # remark\n"
        "halves_of_it = number // 2\n"
        "ordinary_line = call(2)\n"  # 11
        f"much_too_long = {'9' * 90}\n"
    )
    assert code_lines(text) == [2, 7, 11]
    assert code_lines("def broken(:\n") == []


def test_renamed_code_is_the_same_program():
    text = (
        "import os.path as osp\nfrom json import dumps\n\n\nclass Keeper:\n    _seen_items = 3\n\n"
        '    def remember(self, value, ab=1):\n        """value stays in text"""\n        self._seen_items = [value] * ab\n'
        "        return dumps(self._seen_items)  # value\n\n\nRESULT = Keeper().remember(value=osp.join('a', 'b'), ab=2)\n"
    )
    other = renamed(text)
    names = re.findall(r"\w+", other.replace("value stays in text", "").replace("# value", ""))
    assert not {"Keeper", "remember", "value", "_seen_items", "RESULT"} & set(names)
    assert {"osp", "join", "dumps", "self", "ab", "json"} <= set(names)
    assert "value stays in text" in other
    scopes: list[dict[str, object]] = [{}, {}]
    exec(text, scopes[0])
    exec(other, scopes[1])
    [result] = [value for name, value in scopes[1].items() if name.isupper()]
    assert result == scopes[0]["RESULT"] == '["a/b", "a/b"]'
    assert renamed("def broken(:\n") == "def broken(:\n"
    many = renamed("".join(f"variable_{i} = {i}\n" for i in range(3000)))
    assert len(set(re.findall(r"[a-z]+", many))) == 3000


def test_crossing_line_uses_a_name_of_the_file_that_is_shown(rows):
    for row in rows("repo_xfile_400"):
        assert row["context"].startswith("# Path: pack/base.py\n")
        assert row["context"].endswith("# Path: pack/user.py\n")
        [answer] = row["answers"]
        assert answer in ("value_of_it = shared_helper(plain_1)", "other_value = BaseCodec()")
        name = "shared_helper" if "shared" in answer else "BaseCodec"
        assert re.search(rf"^(class|def) {name}\b", row["context"], re.MULTILINE)
        assert f"{row['input']}{answer}\n" in LIBRARY["pack/user.py"]


def test_sections_are_classes_that_the_metric_can_tell_apart(rows):
    for row in rows("debsection_1k"):
        # libs is part of oldlibs, rare is too rare, net is not in the main archive
        assert row["all_classes"] == ["games", "mail", "oldlibs"]
        query = re.fullmatch(r"Description: (tool \d+ for (\w+) people)\nSection:", row["input"])
        assert row["answers"] == [query[2].lower()]
        assert query[1] not in row["context"]
        examples = re.findall(r"^Description: tool \d+ for (\w+) people\nSection: (\w+)$", row["context"], re.MULTILINE)
        assert 2 * len(examples) == len(row["context"].split("\n"))
        assert all(shown.lower() == section for shown, section in examples)
        counts = Counter(section for _, section in examples)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert len(row["context"].split()) <= 1000


def test_descriptions_under_two_sections_are_left_out():
    index = [(f"p{i}", f"tool {i}", "games") for i in range(70)] + [("q", "tool 3", "mail")]
    assert "tool 3" not in debsection.classes(index)["games"]


def test_a_system_without_a_package_index_builds_the_rest(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    built = build_standins(tmp_path, Data([folder]), items=2)
    entry = json.loads((built / "MANIFEST.json").read_text())["sets"]["standin_debsection"]
    assert "no apt-cache" in entry["left_out"]
    assert not (built / "standin_debsection.jsonl").exists()
    assert (built / "standin_repo_xfile.jsonl").is_file()
    with pytest.raises(InputError, match="kvpress data build standins"):
        next(TASKS["standin/standin_debsection"].samples(Request(None, Data([tmp_path]))))


def test_missing_and_wrong_sources_name_the_command(folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="kvpress data fetch standins"):
        build_standins(tmp_path, Data([tmp_path]))
    monkeypatch.setattr(sources, "FACTBOOK_SHA256", "0" * 64)
    with pytest.raises(InputError, match="not the World Factbook"):
        _ = sources.Sources(Data([folder])).factbook
    monkeypatch.setitem(SHA256, "ruler/squad.json", "0" * 64)
    with pytest.raises(InputError, match="kvpress data fetch standins"):
        _ = sources.Sources(Data([folder])).squad


@pytest.mark.parametrize("standin", STANDINS, ids=lambda standin: standin.name)
def test_as_a_task_a_perfect_answer_scores_one_and_an_empty_one_zero(standin, built):
    task = TASKS[f"standin/{standin.name}"]
    samples = list(task.samples(Request(None, Data([built.parent]), limit=6)))
    assert len(samples) == 6
    for sample in samples:
        score = find_scorer(sample.metric)
        assert score(sample.answers[0], sample).value == 1
        assert score("", sample).value == 0
        assert sample.cluster == cluster_of(sample.id)
        assert all(text in sample.context for text in sample.evidence)
    assert task.family == "standin"
    assert task.caveat == standin.caveat


#: prompt, metric and length by hand from LongBench's task.md, dataset2prompt.json and dataset2maxlen.json
FRAMES = {
    "squad_article": ("Read the following text and answer briefly.\n\n", "qa_f1", 64, True),
    "hotpot_docs_1k": ("Answer the question based on the given passages. Only give", "qa_f1", 32, True),
    "squad_fewshot": ("Answer the question based on the given passage. Only give", "qa_f1-firstline", 32, False),
    "debsection": ("Please determine the type of the question below.", "classification-firstline", 64, False),
    "passage_retrieval": ("Here are 30 paragraphs from Wikipedia, along with", "retrieval", 32, True),
    "passage_count": ("There are some paragraphs below sourced from", "count", 32, True),
    "factbook_kv": ("Read the following text and answer briefly.\n\n", "qa_f1", 64, True),
    "stdlib_next": ("Please complete the code given below. \n", "code_sim", 64, False),
    "repo_xfile": ("Please complete the code given below. \n", "code_sim", 64, False),
}


@pytest.mark.parametrize("name", FRAMES)
def test_task_has_the_prompt_of_the_set_it_is_like(name, built):
    sample = next(TASKS[f"standin/standin_{name}"].samples(Request(None, Data([built.parent]))))
    lead, metric, max_new_tokens, chat = FRAMES[name]
    assert sample.lead.startswith(lead)
    assert (sample.metric, sample.max_new_tokens, sample.chat) == (metric, max_new_tokens, chat)
    assert sample.text == sample.lead + sample.context + sample.question
    assert not re.search(r"\{(context|input)\}", sample.lead + sample.question)


def test_evidence_of_retrieval_is_the_paragraph(built):
    for sample in TASKS["standin/standin_passage_retrieval"].samples(Request(None, Data([built.parent]))):
        [paragraph] = sample.evidence
        assert paragraph.startswith(f"{sample.answers[0]}: Article ")
        assert "\n\n" not in paragraph


def test_rows_of_another_set_and_broken_rows_are_refused(built, tmp_path):
    target = tmp_path / "standins"
    target.mkdir()
    (target / "standin_factbook_kv.jsonl").write_bytes((built / "standin_factbook_kv_1k.jsonl").read_bytes())
    with pytest.raises(InputError, match="holds 'standin_factbook_kv_1k'"):
        next(TASKS["standin/standin_factbook_kv"].samples(Request(None, Data([tmp_path]))))
    row = json.loads((built / "standin_passage_count.jsonl").read_text().splitlines()[0])
    for broken in ("{", json.dumps({**row, "_id": "short"}), json.dumps({**row, "answers": []})):
        (target / "standin_passage_count.jsonl").write_text(json.dumps(row) + "\n" + broken + "\n")
        with pytest.raises(InputError, match="line 2 is no stand-in's row"):
            list(TASKS["standin/standin_passage_count"].samples(Request(None, Data([tmp_path]))))


def test_names_never_claim_to_be_longbench():
    from kvpress_eval.tasks.longbench.sets import SETS

    assert all(standin.name.startswith("standin_") for standin in STANDINS)
    assert {standin.name for standin in STANDINS}.isdisjoint({data_set.name for data_set in SETS})
    assert Path(sources.__file__).name == "sources.py"
