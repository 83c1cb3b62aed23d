"""Calibration text: splits that never overlap, windows with one BOS, and sources that cannot be read."""

import itertools
import json

import pytest
import torch
from conftest import byte_tokenizer

from kvpress.errors import InputError
from kvpress.matryoshka.text import Folder, Hub, Python, Text, split_of


@pytest.fixture
def folder(tmp_path):
    for index in range(60):
        (tmp_path / f"{index}.txt").write_text(f"document {index} " * 20)
    return Folder(folder=str(tmp_path), licence="CC0-1.0")


def test_splits_are_disjoint_and_do_not_depend_on_the_folder(folder, tmp_path):
    documents = list(folder.documents())
    by_split = {split: [d for d in documents if split_of(d) == split] for split in ("train", "ranks", "judge")}
    assert sum(len(found) for found in by_split.values()) == 60
    assert 48 <= len(by_split["train"]) <= 59
    (tmp_path / "0.txt").unlink()
    assert [d for d in folder.documents() if split_of(d) == "train"] == [
        d for d in by_split["train"] if d != documents[0]
    ]


def test_windows_hold_one_document_and_one_bos(folder):
    tokenizer = byte_tokenizer()
    text = Text([folder], "train", tokenizer, 50)
    assert text.ids.shape[1] == 50
    assert (text.ids[:, 0] == tokenizer.bos_token_id).all()
    assert (text.ids[:, 1:] != tokenizer.bos_token_id).all()
    for window in text.ids:
        words = set(tokenizer.decode(window[1:]).replace("document", "").split()[1:-1])
        assert len(words) == 1  # the number of one document


def test_order_of_windows(folder):
    text = Text([folder], "train", byte_tokenizer(), 50)
    first = list(itertools.islice(text.shuffled(0), len(text)))
    assert len({tuple(window.tolist()) for window in first}) == len({tuple(window.tolist()) for window in text.ids})
    again = list(itertools.islice(text.shuffled(0), 2 * len(text)))
    assert all(torch.equal(a, b) for a, b in zip(first, again[: len(text)], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, again[len(text) :], strict=True))
    assert torch.equal(text.some(4), text.some(4))
    assert len(text.some(10**6)) == len(text)


def test_the_digest_is_of_the_documents(folder, tmp_path):
    before = Text([folder], "train", byte_tokenizer(), 50).digest
    assert Text([folder], "train", byte_tokenizer(), 60).digest == before
    (tmp_path / "1.txt").write_text("something else " * 30)
    assert Text([folder], "train", byte_tokenizer(), 50).digest != before


def test_the_language_reference_is_a_text():
    documents = list(Python(python="topics", licence="PSF-2.0").documents())
    assert len(documents) > 50
    assert any("assert" in document for document in documents)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"folder": "/nowhere"}, "there is no folder '/nowhere'"),
        ({"pattern": "*.rst"}, r"holds no file that matches '\*.rst'"),
    ],
)
def test_sources_that_cannot_be_read(folder, change, sentence):
    with pytest.raises(InputError, match=sentence):
        Text([folder.model_copy(update=change)], "train", byte_tokenizer(), 50)


def test_documents_that_are_too_short(folder):
    with pytest.raises(InputError, match="no document of split 'judge' has 5,000 tokens"):
        Text([folder], "judge", byte_tokenizer(), 5000)


def test_a_limit_takes_a_little_of_many_documents(folder):
    whole = Text([folder], "train", byte_tokenizer(), 50)
    some = Text([folder], "train", byte_tokenizer(), 50, limit=40)
    assert len(some) == 40
    known = {tuple(window.tolist()) for window in whole.ids}
    assert all(tuple(window.tolist()) in known for window in some.ids)
    numbers = [byte_tokenizer().decode(window[1:]).replace("document", "").split()[1] for window in some.ids]
    assert max(map(numbers.count, numbers)) == 2  # one thirty-second of the limit, rounded up
    assert Text([folder], "train", byte_tokenizer(), 50, limit=10**6).digest == whole.digest


def test_a_data_set_of_the_hub(tmp_path):
    """A folder of files is a data set like those of the hub, read by the same call; what is wrong with one is one sentence."""
    lines = [json.dumps({"body": f"row {index} " * 20}) for index in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    source = Hub(hub=str(tmp_path), column="body", limit=25, licence="CC0-1.0")
    found = list(source.documents())
    assert found == [f"row {index} " * 20 for index in range(25)]
    assert len(Text([source], "train", byte_tokenizer(), 50)) > 0
    for change, part in (
        ({"column": "text"}, "text"),
        ({"split": "tests"}, "tests"),
        ({"hub": str(tmp_path / "no")}, "no"),
    ):
        with pytest.raises(InputError, match=rf"^calibration text: data set '.*' cannot be read \(.*{part}") as caught:
            list(source.model_copy(update=change).documents())
        assert "\n" not in str(caught.value)
