"""Greedy decoding of the rows of one batch, each to its own end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvpress.cache import CompressedCache
from kvpress_eval.records import Stopped


@dataclass(frozen=True)
class Stop:
    """When an answer ends: at an EOS id, at a newline id (but neither may be its first token then), or at the limit."""

    eos: frozenset[int]
    newlines: frozenset[int]
    limit: int

    def reason(self, ids: list[int]) -> Stopped | None:
        """Why an answer with these ids is over, None if it is not."""
        if ids[-1] in self.eos:
            return "eos"
        if ids[-1] in self.newlines:
            return "newline"
        return "length" if len(ids) >= self.limit else None


@dataclass
class Decoded:
    """ids: all new tokens, the stopping one included. seconds: from the first new token to the last."""

    ids: list[int] = field(default_factory=list)
    stopped: Stopped = "length"
    seconds: float = 0.0

    @property
    def answer(self) -> list[int]:
        """The ids without the one that ended it."""
        return self.ids if self.stopped == "length" else self.ids[:-1]


def decode(model: PreTrainedModel, cache: Cache, logits: Tensor, stop: Stop) -> list[Decoded]:
    """Greedy answers of all rows.

    logits: [B, vocabulary] behind the prompt that `cache` has read. A row that has ended leaves the batch, where the
    cache can let it go.
    """
    found = [Decoded() for _ in range(logits.shape[0])]
    rows = list(range(len(found)))
    if stop.newlines:  # LongBench asks for at least one token, and none that ends the answer can be it
        logits = logits.index_fill(1, torch.tensor(sorted(stop.eos | stop.newlines), device=logits.device), -torch.inf)
    start = time.perf_counter()
    while True:
        tokens = logits.argmax(-1).tolist()  # waits for the device, so the clock is right
        now = time.perf_counter() - start
        going = []
        for place, row in enumerate(rows):
            one = found[row]
            one.ids.append(tokens[place])
            one.seconds = now
            reason = stop.reason(one.ids)
            if reason is None:
                going.append(place)
            else:
                one.stopped = reason
        if not going:
            return found
        if len(going) < len(rows):
            _keep_rows(cache, going)
            rows = [rows[place] for place in going]
        ids = torch.tensor([[found[row].ids[-1]] for row in rows], device=logits.device)
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def _keep_rows(cache: Cache, rows: list[int]) -> None:
    assert isinstance(cache, CompressedCache), "only batches of one row are decoded with other caches"
    cache.batch_select_indices(torch.tensor(rows))
