"""Counterfactual caches: copies of the full cache that hold a chosen set of tokens, asked for the reference and for their own answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from kvpress.cache import CompressedCache, join
from kvpress_eval.decode import Decoded, Stop, decode
from kvpress_eval.diagnostic.measure import KeptSets
from kvpress_eval.diagnostic.witness import Witness


@dataclass(frozen=True)
class Reading:
    """The reference under one cache, from its second token on: the first comes out of the prefill, which no eviction changes.

    lowest: smallest difference between a token's logit and the largest other one. log_probability: mean; divergence: mean KL(full ||
    this) in nats. first_wrong: index in the reference of the first token that greedy decoding would not say, None if there is none.
    """

    lowest: float
    log_probability: float
    divergence: float
    first_wrong: int | None

    @property
    def says_reference(self) -> bool:
        return self.first_wrong is None


def with_sets(full: CompressedCache, sets: Sequence[KeptSets]) -> CompressedCache:
    """A batch of copies of a full cache that has read the prompt; row i holds the tokens sets[i]. Close it after use."""
    cache = join([full] * len(sets))
    for layer in cache.compressed_layers:
        rows = [[head.nonzero().flatten() for head in chosen[layer.index]] for chosen in sets]
        layer.storage.keep(rows, layer.seen)
    return cache


def read_reference(
    model: PreTrainedModel, caches: CompressedCache, witness: Witness, tail: Sequence[int]
) -> list[Reading]:
    """Read the reference under every row of a cache, which stands behind the prompt and holds the reference afterwards."""
    ids = torch.tensor([[*tail, *witness.reference]], device=model.device)
    n_rows, m = caches.compressed_layers[0].storage.n_rows, len(witness.reference)
    if m < 2:
        return [Reading(torch.inf, 0.0, 0.0, None)] * n_rows
    logits = model(
        input_ids=ids[:, :-1].expand(n_rows, -1), past_key_values=caches, use_cache=True, logits_to_keep=m - 1
    ).logits
    target = ids[0, -(m - 1) :]
    return [_reading(row.float(), witness.logits.to(row.device), target) for row in logits]


def _reading(logits: Tensor, full: Tensor, target: Tensor) -> Reading:
    """logits, full: [m - 1, vocabulary] of the reference's tokens `target` [m - 1]."""
    own = logits.gather(1, target[:, None])[:, 0]
    others = logits.scatter(1, target[:, None], -torch.inf).amax(1)
    log_probs, full_log_probs = F.log_softmax(logits, -1), F.log_softmax(full, -1)
    wrong = (own <= others).nonzero().flatten()
    return Reading(
        lowest=float((own - others).min()),
        log_probability=float(log_probs.gather(1, target[:, None]).mean()),
        divergence=float(
            F.kl_div(log_probs, full_log_probs, log_target=True, reduction="none").sum(-1).clamp(min=0).mean()
        ),
        first_wrong=int(wrong[0]) + 1 if wrong.numel() else None,
    )


def read_sets(
    model: PreTrainedModel,
    full: CompressedCache,
    witness: Witness,
    tail: Sequence[int],
    sets: Sequence[KeptSets],
    rows: int,
) -> list[Reading]:
    """The reference under each set, `rows` at a time."""
    found: list[Reading] = []
    for some in _split(sets, rows):
        cache = with_sets(full, some)
        try:
            found += read_reference(model, cache, witness, tail)
        finally:
            cache.close()
    return found


def answer_sets(
    model: PreTrainedModel,
    full: CompressedCache,
    logits: Tensor,
    tail: Sequence[int],
    sets: Sequence[KeptSets],
    rows: int,
    stop: Stop,
) -> list[Decoded]:
    """Greedy answers under each set. logits: [1, vocabulary] behind what the full cache has read; with a tail they are made anew."""
    found: list[Decoded] = []
    for some in _split(sets, rows):
        cache = with_sets(full, some)
        try:
            begin = logits.expand(len(some), -1)
            if tail:
                ids = torch.tensor([list(tail)], device=model.device).expand(len(some), -1)
                begin = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            found += decode(model, cache, begin, stop)
        finally:
            cache.close()
    return found


def _split(sets: Sequence[KeptSets], rows: int) -> Iterator[Sequence[KeptSets]]:
    return (sets[start : start + rows] for start in range(0, len(sets), rows))
