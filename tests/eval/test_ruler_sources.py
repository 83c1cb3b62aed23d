"""RULER's essays: the first n words, cut into sentences as nltk cuts exactly that text."""

from __future__ import annotations

import json
from hashlib import sha256

import pytest
from ruler_support import write_files

from kvpress_eval.data import Data
from kvpress_eval.data.packages import SHA256
from kvpress_eval.tasks.ruler.sources import Essays, words

TEXT = """
Dr. Smith went home.  He said "No." Then he left (it was late.) and slept.
What?! Never -- he did. "Why?" asked Mr. Brown.--It was i.e. nothing.
The 3. st place. Really...    however it ended. "Yes!"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    digests = write_files(tmp_path)
    content = json.dumps({"text": TEXT}).encode()
    (tmp_path / "ruler" / "PaulGrahamEssays.json").write_bytes(content)
    digests["ruler/PaulGrahamEssays.json"] = sha256(content).hexdigest()
    for name, digest in digests.items():
        monkeypatch.setitem(SHA256, name, digest)
    return tmp_path


def test_sentences_are_those_of_nltk(folder):
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    parameters.abbrev_types = {"dr", "mr", "i.e"}
    parameters.collocations = {("##number##", "st")}
    parameters.sent_starters = {"however"}
    parameters.ortho_context["the"], parameters.ortho_context["smith"] = 46, 30
    nltk = PunktSentenceTokenizer(parameters)
    essays, plain = Essays(Data([folder])), TEXT.split()
    assert len(nltk.tokenize(" ".join(plain))) > 6
    for n_words in range(1, 3 * len(plain)):
        expected = nltk.tokenize(" ".join((plain * 4)[:n_words]))
        assert essays.sentences(n_words) == expected, n_words


def test_words_of_a_kind(folder):
    data = Data([folder])
    nouns, verbs = words(data, "noun"), words(data, "verb")
    assert (len(nouns), len(words(data, "adjective")), len(verbs)) == (1000, 400, 700)
    assert list(nouns) == (folder / "ruler" / "nounlist.txt").read_text().split("\n")
    assert set(data.used) == {"ruler/nounlist.txt", "ruler/verblist.txt", "ruler/adjectivelist.txt"}
