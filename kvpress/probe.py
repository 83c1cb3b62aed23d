"""Extra forward passes whose queries are evidence: repeating the context (KVzip), or reading a reference answer.

They run after the prompt, over the full cache, and leave no trace in it but the statistics of their queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from kvpress.errors import ContractError, InputError
from kvpress.slots.query_law import Reconstruction

if TYPE_CHECKING:
    from kvpress.cache import CompressedCache


def run_probe(model: PreTrainedModel, cache: CompressedCache) -> None:
    """Feed the law's texts through the model over the cached prompt; the layers gather the statistics."""
    prompt = cache.prompt_ids
    if prompt is None:
        raise InputError(
            f"query_law '{cache.contract.query_law.kind}' needs the prompt as input_ids, not as inputs_embeds"
        )
    mask = cache.prompt_mask if cache.prompt_mask is not None else torch.ones_like(prompt)
    mask = mask.to(prompt.device).clone()
    end = cache.plan.prompt_length
    prompt, mask[:, end:] = prompt[:, :end], 0  # a draft was read along with the prompt: it is no context
    for ids, valid in _texts(cache, model, prompt, mask[:, :end].bool()):
        # padding inside the probe must not be attended by the probe's later queries
        full_mask = torch.cat([mask, valid.to(mask)], 1)
        positions = (full_mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with _probing(cache, valid), torch.no_grad():
            model(
                input_ids=ids,
                attention_mask=full_mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )


def _texts(
    cache: CompressedCache, model: PreTrainedModel, prompt: Tensor, valid: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids [B, m] and their validity [B, m] of each pass."""
    law = cache.contract.query_law
    if not isinstance(law, Reconstruction):
        reference = cache.reference
        assert reference is not None
        if reference.dim() != 2 or prompt.shape[0] % reference.shape[0]:
            raise InputError(
                f"reference has shape {list(reference.shape)}, but the prompt has {prompt.shape[0]} rows: give ids [B, m]"
            )
        vocabulary = model.get_input_embeddings().weight.shape[0]
        if not 0 <= int(reference.min()) <= int(reference.max()) < vocabulary:
            raise InputError(f"reference holds ids outside the model's vocabulary of {vocabulary:,} tokens")
        # beams and several returned sequences repeat the rows of a prompt
        reference = reference.to(prompt.device).repeat_interleave(prompt.shape[0] // reference.shape[0], 0)
        yield reference, torch.ones_like(reference, dtype=torch.bool)
        return
    # chunks are counted from each row's first real token, so that a padded row is asked what it is asked alone
    rows = [prompt[row][valid[row]] for row in range(prompt.shape[0])]
    for start in range(0, max(row.numel() for row in rows), law.chunk):
        lead = _encode(cache, model, law.continuation if start else law.instruction, prompt.device)
        texts = [
            torch.cat([lead, row[max(start - law.hint_tokens, 0) : start], row[start : start + law.chunk]])
            if start < row.numel()
            else row[:0]
            for row in rows
        ]
        longest = max(text.numel() for text in texts)
        ids = torch.stack([F.pad(text, (longest - text.numel(), 0)) for text in texts])
        counts = torch.tensor([text.numel() for text in texts], device=ids.device)
        yield ids, torch.arange(longest, device=ids.device) >= longest - counts[:, None]


def _encode(cache: CompressedCache, model: PreTrainedModel, text: str, device: torch.device) -> Tensor:
    """Ids [m] of an instruction, without special tokens; an empty text needs no tokenizer."""
    if not text:
        return torch.empty(0, dtype=torch.long, device=device)
    tokenizer = cache.tokenizer
    if tokenizer is None:
        from kvpress.session import tokenizer_of

        tokenizer = cache.tokenizer = tokenizer_of(model)
    if tokenizer is None:
        raise ContractError(
            "query_law 'reconstruction' needs the model's tokenizer for its instruction: open the model with kvpress.load, "
            "pass tokenizer=, or set instruction and continuation to ''"
        )
    ids: Any = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    row: Tensor = ids[0].to(device)
    return row


@contextmanager
def _probing(cache: CompressedCache, valid: Tensor) -> Iterator[None]:
    """The compressed layers gather statistics and store nothing; the other layers are put back afterwards."""
    plan = cache.plan
    others = [layer for index, layer in enumerate(cache.layers) if index not in set(cache.compressed)]
    saved = [dict(layer.__dict__) for layer in others]
    plan.probing, plan.probe_valid = True, None if bool(valid.all()) else valid.cpu()
    try:
        yield
    finally:
        plan.probing, plan.probe_valid = False, None
        for layer, state in zip(others, saved, strict=True):
            layer.__dict__.update(state)
