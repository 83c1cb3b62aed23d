"""`needlebench-recipe`: our own needles, at their depths, in prompts of the length that was asked for."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvpress.errors import InputError
from kvpress_eval.data import Data
from kvpress_eval.data.packages import SHA256
from kvpress_eval.prompt import render
from kvpress_eval.prompts import load_prompts
from kvpress_eval.scorers import find_scorer
from kvpress_eval.tasks import TASKS, Request
from kvpress_eval.tasks.needlebench.kinship import recipe_names
from kvpress_eval.tasks.needlebench.needles import recipe_needles

ESSAYS = "ruler/PaulGrahamEssays.json"
KINDS = ["s_rt", "m_rt", "m_rs"]
_WORDS = random.Random(3).sample(
    [a + b + c for a in "bdfglmnprst" for b in "aeiou" for c in ("", "n", "rk", "sto")], 200
)


def prose(n_words):
    rng = random.Random(1)
    words = (rng.choice(_WORDS) for _ in range(n_words))
    return " ".join(
        f"{word.capitalize()}" if i % 9 == 0 else f"{word}." if i % 9 == 8 else word for i, word in enumerate(words)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "ruler").mkdir()
    (folder / ESSAYS).write_text(json.dumps({"text": prose(9000)}))
    return folder


@pytest.fixture(autouse=True)
def known_files(folder, monkeypatch):
    monkeypatch.setitem(SHA256, ESSAYS, hashlib.sha256((folder / ESSAYS).read_bytes()).hexdigest())


@pytest.fixture(scope="module")
def merging_tokenizer(folder):
    """A byte-level BPE with merges, so that a token may span what is put side by side."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    text = json.loads((folder / ESSAYS).read_text())["text"]
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def samples(name, folder, tokenizer, length, limit=None, seed=42, chat=None):
    request = Request(tokenizer, Data([folder]), length=length, limit=limit, seed=seed, chat=chat)
    return list(TASKS[f"needlebench-recipe/{name}"].samples(request))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [5000, 6001])
@pytest.mark.parametrize("chat", [None, False])
def test_prompt_and_answer_fill_the_length(kind, length, chat, folder, tokenizer, merging_tokenizer):
    for which in (tokenizer, merging_tokenizer):
        for sample in samples(kind, folder, which, length, 3, chat=chat):
            total = len(render(which, sample, chat=chat).ids) + sample.max_new_tokens
            assert 0.97 * length <= total <= length
            assert sample.meta["length"] == length


@pytest.mark.parametrize("kind", KINDS)
def test_needles_stand_at_their_depths_between_words(kind, folder, merging_tokenizer):
    longest = max(len(word) for word in _WORDS) + 2
    text = json.loads((folder / ESSAYS).read_text())["text"]
    for sample in samples(kind, folder, merging_tokenizer, 6000, 11):
        places = [sample.context.index(f"\n{needle}\n") for needle in sample.evidence]
        assert places == sorted(places)
        haystack = sample.context
        for needle in sample.evidence:
            haystack = haystack.replace(f"\n{needle}\n", "", 1)
        assert haystack in text + text
        first = sample.meta.get("depth", 0)
        depths = sample.meta.get("depths") or [min(first + 10 * i, 100) for i in range(len(sample.evidence))]
        n_tokens = len(merging_tokenizer(haystack)["input_ids"])
        for i, (place, depth) in enumerate(zip(places, depths, strict=True)):
            before = sample.context[:place]
            for needle in sample.evidence[:i]:
                before = before.replace(f"\n{needle}\n", "", 1)
            in_front = len(merging_tokenizer(before)["input_ids"])
            assert 0 <= in_front - int(n_tokens * depth / 100) + 1 <= longest + 1
            assert before in ("", haystack) or haystack[len(before)] == " "  # no word is cut
        if depths[-1] == 100:
            assert sample.context.endswith(f"\n{sample.evidence[-1]}\n")
        if depths[0] == 0:
            assert sample.context.startswith(f"\n{sample.evidence[0]}\n")


def test_frame_and_answers_of_eleven_needles(folder, tokenizer):
    sample = samples("m_rt", folder, tokenizer, 6000, 1)[0]
    assert sample.metric == "needle_parallel"
    assert sample.max_new_tokens >= 400
    assert sample.meta["depths"] == list(range(0, 101, 10))
    by_id = {needle.id: needle for needle in recipe_needles()}
    needles = [by_id[name] for name in sample.meta["needles"]]
    assert sample.evidence == tuple(needle.text for needle in needles)
    assert sample.answers == tuple(needle.arg2 for needle in needles)
    assert sample.question.count("?") == 11
    assert sample.question.count("______") == 11
    assert sample.question.count("、") == 20
    assert "?Please answer in the format of 'The " in sample.question
    assert sample.cluster == "repeat-0"


@pytest.mark.parametrize("kind", [*KINDS, "atc"])
def test_t6_no_special_token_gets_into_the_text(kind, folder, tokenizer):
    for sample in samples(
        kind, folder, tokenizer, 6000, 2
    ):  # this tokenizer puts BOS in front of everything it encodes
        assert not [token for token in tokenizer.all_special_tokens if token in sample.text]
        ids = render(tokenizer, sample, chat=False).ids
        assert [id_ for id_ in ids if id_ in tokenizer.all_special_ids] == [tokenizer.bos_token_id]


def test_repeats_draw_other_needles_and_other_text(folder, tokenizer):
    found = samples("m_rt", folder, tokenizer, 6000, 5)
    assert len({sample.cluster for sample in found}) == 5
    assert len({sample.answers for sample in found}) == 5
    stretches = {sample.context.replace("\n", "").split("Island")[-1][:40] for sample in found}
    assert len(stretches) == 5


@pytest.mark.parametrize("kind", [*KINDS, "atc"])
def test_samples_are_repeatable_and_a_limit_takes_the_first(kind, folder, merging_tokenizer):
    found = samples(kind, folder, merging_tokenizer, 4000, 6)
    assert found == samples(kind, folder, merging_tokenizer, 4000, 6)
    assert found[:3] == samples(kind, folder, merging_tokenizer, 4000, 3)
    assert found[0].context != samples(kind, folder, merging_tokenizer, 4000, 1, seed=43)[0].context
    assert len({sample.id for sample in found}) == 6


@pytest.mark.parametrize("kind", [*KINDS, "atc"])
def test_perfect_answer_scores_one_and_an_empty_one_zero(kind, folder, merging_tokenizer):
    for sample in samples(kind, folder, merging_tokenizer, 4000, 8):
        score = find_scorer(sample.metric)
        assert score(sample.right_answer, sample).value == 1
        assert score("", sample).value == 0
        # what stands in the prompt's question alone must not earn anything
        assert score(sample.question, sample).value == 0


def test_depths_of_a_limited_run_are_balanced(folder, merging_tokenizer):
    assert sorted(s.meta["depth"] for s in samples("s_rt", folder, merging_tokenizer, 4000, 11)) == list(
        range(0, 101, 10)
    )
    facts = Counter(s.meta["facts"] for s in samples("m_rs", folder, merging_tokenizer, 4000, 11))
    assert sorted(facts.values()) == [2, 3, 3, 3]


def test_needles_are_unambiguous():
    needles = recipe_needles()
    assert len(needles) >= 40
    for field in ("id", "arg1", "arg2", "text", "question"):
        assert len({getattr(needle, field) for needle in needles}) == len(needles)
    for needle in needles:
        assert needle.arg2 in needle.text
        assert needle.arg1 in needle.question
        others = [other for other in needles if other is not needle]
        assert not any(needle.arg2 in other.text or needle.arg2 in other.question for other in others)
        assert needle.arg2 not in needle.question
        assert not any(needle.arg1 in other.question for other in others)
        assert needle.question.count("'") == 2
        assert needle.question.count("?") == 1
        shown = needle.question.split("'")[1]
        assert shown.endswith(" ______.")
        assert shown.count(".") == 1


def test_invented_names_reach_for_the_longest_chain():
    names = recipe_names()
    assert len(set(names)) == len(names) > max(load_prompts("needlebench")["atc_needles"])
    assert not any("'" in name or "," in name for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_length_that_is_too_short_says_which_one_is_not(kind, folder, merging_tokenizer):
    with pytest.raises(InputError, match="needs a length of") as error:
        samples(kind, folder, merging_tokenizer, 500, 1)
    enough = int(str(error.value).split("length of ")[1].split(" tokens")[0].replace(",", ""))
    assert samples(kind, folder, merging_tokenizer, enough + 8, 1)[0].meta["haystack_tokens"] >= 64


def test_a_haystack_that_encodes_longer_than_planned_asks_for_more_length(folder, merging_tokenizer, monkeypatch):
    from kvpress_eval.tasks.needlebench.recipe_haystack import Haystack

    hide = Haystack.hide
    monkeypatch.setattr(Haystack, "hide", lambda self, n, *more: hide(self, n, *more) + " amber" * 60)
    with pytest.raises(InputError, match="needs a length of") as error:
        samples("m_rt", folder, merging_tokenizer, 500, 1)
    least = int(str(error.value).split("length of ")[1].split(" tokens")[0].replace(",", ""))
    with pytest.raises(InputError, match="needs a length of") as error:
        samples("m_rt", folder, merging_tokenizer, least + 8, 1)
    assert int(str(error.value).split("length of ")[1].split(" tokens")[0].replace(",", "")) > least + 8


def test_essays_that_are_too_short_are_an_error(folder, tokenizer):
    with pytest.raises(InputError, match="lower the length"):
        samples("s_rt", folder, tokenizer, 100_000, 1)


def test_the_whole_text_can_be_used(folder, tokenizer):
    text = json.loads((folder / ESSAYS).read_text())["text"]
    sample = samples("s_rt", folder, tokenizer, len(text) + 300, 1)[0]
    assert sample.meta["haystack_tokens"] > 0.98 * len(text)


def test_chains_are_as_long_as_the_length_allows(folder, merging_tokenizer):
    short = samples("atc", folder, merging_tokenizer, 4000)
    long = samples("atc", folder, merging_tokenizer, 7000)
    counts = [sorted({sample.meta["facts"] for sample in found}) for found in (short, long)]
    assert counts[0] == counts[1][: len(counts[0])]
    assert len(counts[0]) < len(counts[1])
    for found, length in ((short, 4000), (long, 7000)):
        assert max(len(render(merging_tokenizer, s).ids) + s.max_new_tokens for s in found) <= length
    with pytest.raises(InputError, match="needs a length of"):
        samples("atc", folder, merging_tokenizer, 1500)


def test_missing_essays_name_the_command(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("KVPRESS_DATA", str(tmp_path))
    with pytest.raises(InputError, match="kvpress data fetch ruler"):
        samples("m_rt", tmp_path, tokenizer, 4000, 1)
    with pytest.raises(InputError, match="needs a length"):
        samples("atc", tmp_path, tokenizer, None, 1)
