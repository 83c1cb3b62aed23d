"""`explain`: a sample's text with its fate, without the model's weights, and the mistakes it refuses."""

import json
import re

import pytest
from induction_model import induction_model, induction_tokenizer, lookup_sample
from rich.console import Console

from kvpress.errors import InputError
from kvpress_eval.diagnostic.explain import explain
from kvpress_eval.diagnostic.explain_view import to_json, view
from kvpress_eval.diagnostic.finding import pack_counts, unpack_counts
from kvpress_eval.diagnostic.words import base_sentence
from kvpress_eval.records import read_run
from kvpress_eval.runner import Runner
from kvpress_eval.sweep import parse_sweep
from kvpress_eval.tasks import TASKS, Task, register

HOST = {
    "name": "host",
    "query_law": {"kind": "tail", "window": 8},
    "access": {"kind": "aggregate", "pooling": "avg", "kernel": 7},
    "protection": {"kind": "standard", "recent": 8},
}


class Lookup(Task):
    name, family = "toy/lookup", "toy"

    def samples(self, request):
        for index in request.indices(20):
            yield lookup_sample(index)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A diagnostic run of three samples with a model that looks things up."""
    if "toy/lookup" not in TASKS:
        register(Lookup())
    place = tmp_path_factory.mktemp("explain")
    induction_model().save_pretrained(place / "model")
    induction_tokenizer().save_pretrained(place / "model")
    fields = {
        "model": str(place / "model"),
        "tasks": [{"task": "toy/lookup"}],
        "limit": 3,
        "budgets": ["20%"],
        "host": HOST,
        "swaps": {"unpooled": {"swap": {"access": "aggregate"}}, "mii": {"swap": {"ranking": "mii"}}},
        "dtype": "float32",
    }
    Runner.begin(parse_sweep(fields, "test"), place / "run").run()
    yield place / "run"
    del TASKS["toy/lookup"]


def text_of(renderable, width=110):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_the_failing_arm_is_chosen_and_its_pieces_are_the_prompt(run):
    found = explain(run, "0")
    assert found.record.arm == "unpooled@20%"
    assert found.finding.verdict == "access"
    words = " ".join(piece.text for piece in found.pieces).split()
    sample = lookup_sample(0)
    assert words == (sample.context + sample.question + sample.answer_prefix).split()
    gold = [piece for piece in found.pieces if piece.gold]
    assert " ".join(piece.text for piece in gold).split() == sample.evidence[0].split()
    counts = unpack_counts(found.finding.kept, found.record.n_prompt)
    for piece in found.pieces:
        part = counts[piece.first : piece.first + piece.n]
        assert piece.share == pytest.approx(part.mean() / found.finding.heads)
        assert piece.fate == ("kept" if part.min() >= 2 else "some" if part.min() > 0 else "evicted")


@pytest.mark.parametrize("everything", [False, True])
def test_the_view_says_the_verdict_and_shows_the_evidence(run, everything):
    found = explain(run, "toy/lookup/0")
    text = " ".join(text_of(view(found, everything)).split())  # lines are wrapped
    assert "lost this answer in stage I access" in text
    assert "As many tokens exchanged at random" in text
    assert re.search(r"bring it back (never|in 1 of 3 draws)", text)
    assert "full cache" in text
    assert "Its base host@20% has the answer: here the swap of access costs 100 points." in text
    assert " ".join(lookup_sample(0).evidence[0].split()[:2]) in text
    assert ("tokens ...]" in text) is not everything


@pytest.mark.parametrize("name", ["1", "lookup/1", "toy/lookup/1"])
def test_a_sample_is_named_with_or_without_its_task_and_family(run, name):
    assert explain(run, name).record.sample == "1"


def test_an_arm_that_did_not_fail_is_explained_too(run):
    found = explain(run, "0", arm="host@20%", task="lookup")
    assert "did not lose this answer" in text_of(view(found))
    assert not found.finding.replays
    assert found.base is None


def test_the_object_is_plain_json(run):
    found = to_json(explain(run, "1"))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["finding"]["verdict"] == "access"
    assert found["sentence"].startswith("unpooled@20% lost this answer")
    assert found["base"] == {"arm": "host@20%", "slots": ["access"], "score": 1.0}


@pytest.mark.parametrize(
    ("sample", "options", "sentence"),
    [
        ("99", {}, "no sample '99'"),
        ("0", {"arm": "snapkv@5%"}, "no arm 'snapkv@5%'"),
        ("0", {"task": "other"}, "in task 'other'"),
    ],
)
def test_mistakes_are_one_sentence(run, sample, options, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        explain(run, sample, **options)
    assert "\n" not in str(caught.value)


def test_a_run_without_findings_is_named(run, tmp_path):
    (tmp_path / "manifest.json").write_bytes((run / "manifest.json").read_bytes())
    lines = [one.model_copy(update={"measures": {}}).model_dump_json() for one in read_run(run)]
    (tmp_path / "records.jsonl").write_text("".join(line + "\n" for line in lines))
    with pytest.raises(InputError, match="not of `kvpress diagnose`"):
        explain(tmp_path, "0")


def test_a_prompt_that_has_changed_is_noticed(run, tmp_path):
    (tmp_path / "manifest.json").write_bytes((run / "manifest.json").read_bytes())
    lines = [one.model_copy(update={"prompt_sha": "0" * 16}).model_dump_json() for one in read_run(run)]
    (tmp_path / "records.jsonl").write_text("".join(line + "\n" for line in lines))
    with pytest.raises(InputError, match="is not what it was"):
        explain(tmp_path, "0")


def test_a_sample_that_is_there_twice_must_be_named_in_full(run, tmp_path):
    (tmp_path / "manifest.json").write_bytes((run / "manifest.json").read_bytes())
    records = read_run(run)
    twice = [*records, *(one.model_copy(update={"mode": "query_agnostic"}) for one in records)]
    (tmp_path / "records.jsonl").write_text("".join(one.model_dump_json() + "\n" for one in twice))
    with pytest.raises(InputError, match="say which with --mode"):
        explain(tmp_path, "0")
    assert explain(tmp_path, "0", mode="query_aware").record.mode == "query_aware"


@pytest.mark.parametrize(
    ("base", "arm", "told"),
    [(1, 0, "has the answer"), (0.5, 0, "does better"), (0, 1, "gains 100 points"), (0.5, 0.5, "scores the same")],
)
def test_what_the_base_does_with_the_sample(base, arm, told):
    assert told in base_sentence("snapkv@5%", ["ranking"], base, arm, 1)


def test_packed_counts_come_back_and_rubbish_does_not():
    import numpy as np

    counts = np.array([0, 3, 65_535, 7])
    assert unpack_counts(pack_counts(counts), 4).tolist() == counts.tolist()
    for text, n in ((pack_counts(counts), 3), (pack_counts(counts), 5), ("???", 4), ("", 4)):
        with pytest.raises(InputError, match="no packed counts"):
            unpack_counts(text, n)


def test_a_resumed_run_repeats_the_findings(run, tmp_path):
    whole = [one.model_dump_json(exclude={"seconds"}) for one in read_run(run)]
    (tmp_path / "manifest.json").write_bytes((run / "manifest.json").read_bytes())
    lines = (run / "records.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:50])
    Runner.resume(tmp_path).run()
    assert [one.model_dump_json(exclude={"seconds"}) for one in read_run(tmp_path)] == whole
