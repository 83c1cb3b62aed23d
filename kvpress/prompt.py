"""A prompt from a document and a question: token ids with no doubled BOS, that fit into the model's context.

The trap is the doubled BOS: a chat template writes the token into its text, and a tokenizer that is then called with
its defaults puts a second one in front, which moves the attention sink and costs accuracy without any error.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from kvpress.errors import InputError

INSTRUCTION = "Read the document and answer the question in a few words."


def build_prompt(
    tokenizer: PreTrainedTokenizerBase, document: str, question: str | None = None, *, chat: bool | None = None
) -> torch.Tensor:
    """Token ids of one prompt, int64 [1, n_tokens], with exactly one BOS where the tokenizer or template asks for one.

    chat: True renders one user message with the chat template and raises InputError if the tokenizer has none; None
        does so only where there is one; False gives plain text that ends in "Answer:", or in the document itself if no
        question is asked.
    """
    templated = chat if chat is not None else bool(tokenizer.chat_template)
    if templated and not tokenizer.chat_template:
        raise InputError("this tokenizer has no chat template: use plain text (--no-chat)")
    text = document.strip()
    if question:
        text = f"{INSTRUCTION}\n\n{text}\n\nQuestion: {question.strip()}"
    if not text:
        raise InputError("the prompt is empty: give a document, a question, or both")
    if templated:
        message = [{"role": "user", "content": text}]
        rendered = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        # the template is the authority on special tokens: it has written those that the model was trained with
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(f"{text}\n\nAnswer:" if question else text)["input_ids"]
    return torch.tensor([_one_bos(ids, tokenizer.bos_token_id)], dtype=torch.long)


def _one_bos(ids: list[int], bos: int | None) -> list[int]:
    """Drop BOS tokens in front but one, such as those of a document that begins with the written-out token."""
    if bos is None:
        return ids
    while len(ids) > 1 and ids[0] == ids[1] == bos:
        ids = ids[1:]
    return ids


def context_length(config: PreTrainedConfig) -> int | None:
    """Positions that the model was made for, RoPE scaling included; None where the model states no limit."""
    text_config = config.get_text_config()
    limit: int | None = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_parameters", None) or {}
    if limit is not None and "factor" in rope and "original_max_position_embeddings" in rope:
        # YaRN configurations often keep the unscaled length as max_position_embeddings
        limit = max(limit, int(rope["factor"] * rope["original_max_position_embeddings"]))
    return limit


def check_length(config: PreTrainedConfig, n_prompt: int, max_new_tokens: int) -> None:
    """Raise InputError if the prompt and the tokens to generate do not fit into the model's context."""
    limit = context_length(config)
    if limit is not None and n_prompt + max_new_tokens > limit:
        raise InputError(
            f"the prompt has {n_prompt:,} tokens and {max_new_tokens:,} more were asked for, but the model's context "
            f"is {limit:,}: shorten the document by {n_prompt + max_new_tokens - limit:,} tokens or ask for fewer"
        )
