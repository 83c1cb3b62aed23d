"""Small stand-ins for RULER's files, and three tokenizers of different kinds, so that its tests need no download."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kvpress_eval.data import Data
from kvpress_eval.data.packages import SHA256
from kvpress_eval.sample import Sample
from kvpress_eval.tasks import Request, find_tasks

SYLLABLES = [
    "ba",
    "be",
    "bi",
    "bo",
    "da",
    "de",
    "di",
    "do",
    "ka",
    "ke",
    "ki",
    "ko",
    "la",
    "le",
    "li",
    "lo",
    "ma",
    "me",
    "mi",
    "mo",
    "na",
    "ne",
    "ni",
    "no",
    "ra",
    "re",
    "ri",
    "ro",
    "sa",
    "se",
    "si",
    "so",
    "ta",
    "te",
]
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}<user>{{ m['content'] }}</user>\n{% endfor %}<assistant>"
N_PARAGRAPHS = 14


@cache
def word_list() -> tuple[str, ...]:
    """Two thousand distinct made-up words of four letters and more."""
    rng, found = random.Random(1), dict[str, None]()
    while len(found) < 2000:
        found["".join(rng.choices(SYLLABLES, k=rng.randint(2, 4)))] = None
    return tuple(found)


def sentence(rng: random.Random, n_words: int) -> str:
    return " ".join(rng.choices(word_list(), k=n_words)).capitalize() + "."


def paragraph(rng: random.Random) -> str:
    return " ".join(sentence(rng, rng.randint(6, 14)) for _ in range(rng.randint(4, 11)))


def squad(rng: random.Random) -> dict[str, object]:
    """Eight articles; every paragraph has two questions that it answers and one that it does not."""
    articles = []
    for article in range(8):
        paragraphs = []
        for number in range(N_PARAGRAPHS):
            context = paragraph(rng)
            words = context.split()
            asked = [
                {"question": f"Which word of {article} {number} {place}?", "is_impossible": False,
                 "answers": [{"text": words[place]}, {"text": words[place]}, {"text": " ".join(words[place : place + 2])}]}
                for place in (3, 9)
            ]  # fmt: skip
            asked.append({"question": "What is not there?", "is_impossible": True, "answers": []})
            paragraphs.append({"context": context, "qas": asked})
        articles.append({"title": f"Article_{article}", "paragraphs": paragraphs})
    return {"data": articles}


def hotpotqa(rng: random.Random) -> list[dict[str, object]]:
    """Forty questions with ten paragraphs each, of which the fourth and the eighth are the supporting ones."""
    items: list[dict[str, object]] = []
    for number in range(40):
        context = [
            [f"Title {number} {place}", [sentence(rng, rng.randint(8, 20)) for _ in range(rng.randint(1, 4))]]
            for place in range(10)
        ]
        items.append(
            {
                "_id": f"id{number}",
                "question": f"What of {number}?",
                "answer": str(context[3][1][0]).split()[2],  # type: ignore[index]
                "supporting_facts": [[context[3][0], 0], [context[7][0], 0]],
                "context": context,
            }
        )
    return items


def essays() -> str:
    """Twelve thousand words; sentences end in a full stop and nothing else does."""
    rng = random.Random(3)
    return "\n\n".join(paragraph(rng) for _ in range(180))


def write_files(folder: Path) -> dict[str, str]:
    """Write all files of RULER below `folder`; returns their digests by name."""
    words = word_list()
    punkt = "ruler/punkt_tab/english"
    files = {
        "ruler/nounlist.txt": "\n".join(words[:1000]),
        "ruler/adjectivelist.txt": "\n".join(words[1000:1400]),
        "ruler/verblist.txt": "\n".join(words[1300:]),
        "ruler/PaulGrahamEssays.json": json.dumps({"text": essays()}),
        "ruler/squad.json": json.dumps(squad(random.Random(4))),
        "ruler/hotpotqa.json": json.dumps(hotpotqa(random.Random(5))),
        f"{punkt}/abbrev_types.txt": "dr\nmr\ni.e\n",
        f"{punkt}/collocations.tab": "##number##\tst\n",
        f"{punkt}/ortho_context.tab": "the\t46\nsmith\t30\n",
        f"{punkt}/sent_starters.txt": "however\n",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return {name: sha256(content.encode()).hexdigest() for name, content in files.items()}


def _texts() -> list[str]:
    frames = (
        "Some special magic numbers uuids are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the afterwards. What are all the special magic numbers for mentioned in the provided text? A number uuid is "
        "One of The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. Memorize and "
        "track the chain(s) of variable assignment hidden in the following text. Question: Find all variables that are "
        "assigned assgined the value in the text above. Answer: According to the chain(s) of variable assignment, they "
        "are: VAR Document: Below is a numbered list of words. In these words, some appear more often than others. The top "
        "words that appear most often in the list are: Read the coded, the three most frequently appeared words. Only give "
        "me the answer and do not output any other words. The following are given documents. based on given"
    )
    uuids = " ".join(f"{random.Random(seed).getrandbits(128):032x}" for seed in range(40))
    return [*[frames] * 20, uuids, " ".join(word_list()), essays()[:40_000]]


def _wrapped(backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


@cache
def bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE with BOS and a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>"]
    backend.train_from_iterator(
        _texts(),
        trainers.BpeTrainer(vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = _wrapped(backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@cache
def word_level() -> PreTrainedTokenizerFast:
    """Known words of three letters and more are tokens, and so is every other character; no BOS, no chat template."""
    word = r"(?<![A-Za-z])(?![a-f]+(?![A-Za-z]))[A-Za-z]{3,}(?![A-Za-z])"  # a group of a uuid is no word
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    known = dict.fromkeys(["[UNK]", *characters, *re.findall(word, " ".join(_texts()))])
    vocabulary = {token: index for index, token in enumerate(known)}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(f"{word}|[\\s\\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return _wrapped(backend, unk_token="[UNK]", eos_token="[UNK]")


@cache
def unigram() -> PreTrainedTokenizerFast:
    """A Unigram model over words with marked spaces; BOS, no chat template."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Replace("\t", " ")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    characters = [chr(code) for code in range(33, 127)] + ["\n", "▁"]
    trainer = trainers.UnigramTrainer(
        vocab_size=1200,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=characters,
        show_progress=False,
    )
    backend.train_from_iterator(_texts(), trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"bpe": bpe, "word_level": word_level, "unigram": unigram}


@pytest.fixture(scope="module")
def ruler_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Data]:
    """A data folder with the small files, which pass for the real ones."""
    folder = tmp_path_factory.mktemp("ruler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVPRESS_DATA", str(tmp_path_factory.mktemp("empty")))
        for name, digest in write_files(folder).items():
            patch.setitem(SHA256, name, digest)
        yield Data([folder])


def samples(data: Data, name: str, length: int, limit: int, tokenizer: str = "bpe", **changes: Any) -> list[Sample]:
    """The first samples of a task."""
    request = Request(TOKENIZERS[tokenizer](), data, length=length, limit=limit, **changes)
    return list(find_tasks(name)[0].samples(request))
