"""One generation with its cost: the answer, the cache's bytes, seconds until the first token, tokens per second.

Full cache and contracts are timed by the same clock, so that the figures of two runs can stand side by side.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from kvpress.backend import BackendRequest
from kvpress.contract import Contract
from kvpress.prompt import check_length
from kvpress.report import Report
from kvpress.session import compress

FULL_CACHE = "full cache"


@dataclass(frozen=True)
class Run:
    """What one greedy generation gave and what it cost. `report` is None for transformers' own full cache."""

    contract: str
    text: str
    prompt_tokens: int
    new_tokens: int
    cache_bytes: int  # at the end, the keys and values of the generated tokens included
    prefill_seconds: float  # until the first token; evidence and eviction included
    decode_seconds: float  # from the first token to the last
    report: Report | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed; the first token belongs to the prefill. None if only one token was generated."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 and self.decode_seconds > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, the report included."""
        figures = {name: value for name, value in vars(self).items() if name != "report"}
        report = {} if self.report is None else {"report": self.report.to_dict()}
        return {**figures, "tokens_per_second": self.tokens_per_second, **report}


class Clock(BaseStreamer):
    """A streamer that notes when tokens arrive and hands them on. `generate` sends the prompt first, then each token."""

    def __init__(self, listener: BaseStreamer | None = None) -> None:
        self.listener = listener
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if self.listener is not None:
            self.listener.put(value)

    def end(self) -> None:
        if self.listener is not None:
            self.listener.end()


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    contract: Contract | None,
    *,
    max_new_tokens: int,
    reference: torch.Tensor | None = None,
    backend: str | BackendRequest = "auto",
    streamer: BaseStreamer | None = None,
) -> Run:
    """Generate greedily under `contract`, or with transformers' own full cache if it is None.

    input_ids: int64 [1, n_tokens], on any device.
    reference: int64 [1, m], the answer whose queries an oracle contract takes as evidence. backend: as in `compress`.
    Raises InputError for a prompt longer than the model's context, KvpressError for what the contract cannot do.
    """
    n_prompt = input_ids.shape[1]
    check_length(model.config, n_prompt, max_new_tokens)
    clock = Clock(streamer)
    ids = input_ids.to(model.device)
    arguments: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "streamer": clock,
        # open-ended generation with a model that has no padding token warns otherwise
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    }
    report = None
    if contract is None:
        cache = DynamicCache(config=model.config)
        output = model.generate(past_key_values=cache, **arguments)
        cache_bytes = full_cache_bytes(cache)
    else:
        with compress(model, contract, tokenizer=tokenizer, reference=reference, backend=backend) as session:
            output = model.generate(**arguments)
        report = session.report()
        cache_bytes = session.cache.nbytes if session.cache is not None else 0
    new_ids = output[0, n_prompt:]
    return Run(
        contract=FULL_CACHE if contract is None else contract.name,
        text=str(tokenizer.decode(new_ids, skip_special_tokens=True)).strip(),
        prompt_tokens=n_prompt,
        new_tokens=len(new_ids),
        cache_bytes=cache_bytes,
        prefill_seconds=clock.times[1] - clock.times[0],
        decode_seconds=clock.times[-1] - clock.times[1],
        report=report,
    )


def full_cache_bytes(cache: DynamicCache) -> int:
    """Bytes of the keys and values that transformers' own cache holds."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
