"""Prompts fill 97 to 100 % of their budget in the model's own tokenizer, whichever it is; what cannot be is refused."""

from __future__ import annotations

import re

import pytest
from ruler_support import TOKENIZERS, bpe, samples

from kvpress.errors import InputError
from kvpress_eval.data import Data
from kvpress_eval.tasks import find_tasks

TASKS = [task.name for task in find_tasks("ruler-2026")]
#: the worked example of cwe alone is longer than 2,048 characters, which are tokens in the last of them
LENGTHS = {"bpe": 2048, "unigram": 2048, "word_level": 4096}


def counted(name, sample, chat=True):
    """Tokens of the prompt, counted on the text that the chat template makes, and the tokens to be generated."""
    tokenizer = TOKENIZERS[name]()
    text = sample.text
    if chat and tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        assert text.startswith("<s>")
        text = text[len("<s>") :]
    ids = tokenizer(text + sample.answer_prefix, add_special_tokens=False)["input_ids"]
    return len(ids) + sample.max_new_tokens


@pytest.mark.parametrize(
    ("family", "tokenizer"),
    [("ruler-2024", "bpe"), ("ruler-2024", "word_level"), ("ruler-2026", "unigram"), ("ruler-posfix", "bpe")],
)
@pytest.mark.parametrize("task", [name.split("/")[1] for name in TASKS])
def test_t20_true_length(ruler_data, family, tokenizer, task):
    length = LENGTHS[tokenizer]
    for sample in samples(ruler_data, f"{family}/{task}", length, 2, tokenizer):
        assert 0.97 * length <= counted(tokenizer, sample) <= length


def test_chat_template_counts_only_where_it_is_used(ruler_data):
    for chat in (None, False):
        (sample,) = samples(ruler_data, "ruler-2026/niah_single_2", 1024, 1, chat=chat)
        assert 0.99 * 1024 <= counted("bpe", sample, chat=chat is None) <= 1024


def test_whole_increments_of_2024(ruler_data):
    """At 8,192 tokens an increment of 10 words, each listed three times, is under 3 % and stays whole."""

    def n_words(family):
        (sample,) = samples(ruler_data, f"{family}/cwe", 8192, 1)
        return len(set(re.findall(r"\d+\. (\S+)", sample.context.rsplit("most often.\n", 1)[1])))

    assert n_words("ruler-2024") % 10 == 0
    assert n_words("ruler-2026") // 10 * 10 == n_words("ruler-2024") < n_words("ruler-2026")


def test_a_length_is_needed(ruler_data):
    with pytest.raises(InputError, match="give one, for example --length 4096"):
        samples(ruler_data, "ruler-2026/vt", None, 1)


@pytest.mark.parametrize("name", TASKS)
def test_a_budget_that_is_too_small_names_one_that_works(ruler_data, name):
    with pytest.raises(InputError, match=rf"{name} does not fit into 120 tokens: .* needs at least ([\d,]+)") as error:
        samples(ruler_data, name, 120, 1)
    smallest = int(str(error.value).split("at least ")[1].split()[0].replace(",", ""))
    (sample,) = samples(ruler_data, name, smallest, 1)
    assert counted("bpe", sample) == smallest


def test_steps_that_are_too_coarse_name_a_length_that_works(ruler_data):
    name = "ruler-2026/niah_single_1"
    with pytest.raises(InputError, match=r"grows in steps of \d+ tokens .* use a length of at least ([\d,]+)") as error:
        samples(ruler_data, name, 1024, 1, "word_level")
    length = int(str(error.value).split("at least ")[1].replace(",", ""))
    assert 1024 < length < 2048
    for sample in samples(ruler_data, name, length, 3, "word_level"):
        assert 0.97 * length <= counted("word_level", sample) <= length


def test_missing_data_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("KVPRESS_DATA", str(tmp_path))
    for name in TASKS:
        if name.endswith(("/vt", "/fwe")):
            continue
        with pytest.raises(InputError, match=r"ruler/.* is missing .*`kvpress data fetch ruler`"):
            samples(Data(), name, 2048, 1)


def test_another_file_is_refused(ruler_data, tmp_path, monkeypatch):
    (tmp_path / "ruler").mkdir()
    (tmp_path / "ruler" / "nounlist.txt").write_text("other\nwords\n")
    with pytest.raises(InputError, match=r"is not the file this task was checked with"):
        samples(Data([tmp_path, *ruler_data.folders]), "ruler-2026/niah_single_1", 2048, 1)


def test_the_run_knows_which_files_were_used(ruler_data):
    data = Data(ruler_data.folders)
    samples(data, "ruler-2026/niah_single_2", 1024, 1)
    assert {"ruler/PaulGrahamEssays.json", "ruler/nounlist.txt", "ruler/adjectivelist.txt"} < set(data.used)


def test_bos_is_not_part_of_the_budget(ruler_data):
    from kvpress_eval.prompt import render

    (sample,) = samples(ruler_data, "ruler-2026/niah_single_2", 1024, 1)
    ids = render(bpe(), sample).ids
    assert ids[0] == bpe().bos_token_id
    assert len(ids) - 1 + sample.max_new_tokens == counted("bpe", sample)
