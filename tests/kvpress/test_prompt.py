"""Prompts: one BOS whatever puts it there, and a length that fits."""

import pytest
import torch
from transformers import LlamaConfig

from kvpress.errors import InputError
from kvpress.prompt import build_prompt, check_length, context_length

DOCUMENT = "The hen was called Duchess."


def n_bos(ids: torch.Tensor, tokenizer) -> int:
    return int((ids == tokenizer.bos_token_id).sum())


@pytest.mark.parametrize("chat", [True, False, None])
@pytest.mark.parametrize("question", [None, "What was the name of the hen?"])
def test_exactly_one_bos(tokenizer, chat, question):
    ids = build_prompt(tokenizer, DOCUMENT, question, chat=chat)
    assert ids.dtype == torch.long
    assert ids.shape[0] == 1
    assert ids[0, 0] == tokenizer.bos_token_id
    assert n_bos(ids, tokenizer) == 1


def test_written_out_bos_is_not_doubled(tokenizer):
    ids = build_prompt(tokenizer, "<s>" + DOCUMENT, chat=False)
    assert n_bos(ids, tokenizer) == 1


def test_question_comes_last(tokenizer):
    text = tokenizer.decode(build_prompt(tokenizer, DOCUMENT, "Which hen?", chat=False)[0])
    assert text.index(DOCUMENT) < text.index("Question: Which hen?")
    assert text.endswith("Answer:")


def test_plain_text_without_question_stays_itself(tokenizer):
    ids = build_prompt(tokenizer, DOCUMENT, chat=False)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == DOCUMENT


def test_chat_without_template_is_refused(plain_tokenizer):
    with pytest.raises(InputError, match="no chat template"):
        build_prompt(plain_tokenizer, DOCUMENT, chat=True)
    assert build_prompt(plain_tokenizer, DOCUMENT).shape[1] == len(DOCUMENT) + 1


def test_empty_prompt_is_refused(tokenizer):
    with pytest.raises(InputError, match="empty"):
        build_prompt(tokenizer, " \n")


def test_prompt_and_new_tokens_must_fit():
    config = LlamaConfig(max_position_embeddings=100)
    check_length(config, 90, 10)
    with pytest.raises(InputError, match="context is 100: shorten the document by 1 tokens"):
        check_length(config, 91, 10)


def test_yarn_extends_the_context():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "rope_theta": 10000.0}
    assert context_length(LlamaConfig(max_position_embeddings=100, rope_parameters=rope)) == 400
