"""Counterfactual caches: copies of the full cache that hold a chosen set of tokens, asked for the reference and for their own answer."""

from __future__ import annotations

import hashlib
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

#: bytes of the copies of a full cache that are held at a time
MAX_COPIES = 4 * 2**30


@dataclass(frozen=True)
class Reading:
    """The reference under one cache.

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
    model: PreTrainedModel, caches: CompressedCache, witness: Witness, first: Tensor, tail: Sequence[int]
) -> list[Reading]:
    """Read the reference under every row of a cache, which stands behind the prompt and holds the reference afterwards.

    first: [rows, vocabulary] logits behind the prompt; with a tail the first token is chosen behind that.
    """
    m = len(witness.reference)
    ids = torch.tensor([[*tail, *witness.reference[:-1]]], device=model.device).expand(first.shape[0], -1)
    parts = [] if tail else [first[:, None].float()]
    if ids.shape[1]:
        keep = m if tail else m - 1
        parts.append(model(input_ids=ids, past_key_values=caches, use_cache=True, logits_to_keep=keep).logits.float())
    target = torch.tensor(witness.reference, device=model.device)
    full = F.log_softmax(witness.logits.to(model.device), -1)
    return [_reading(row, full, target) for row in torch.cat(parts, 1)]


def _reading(logits: Tensor, full_log_probs: Tensor, target: Tensor) -> Reading:
    """logits: [m, vocabulary], from which the reference's tokens `target` [m] are chosen; full_log_probs: the same of the full cache."""
    own = logits.gather(1, target[:, None])[:, 0]
    others = logits.scatter(1, target[:, None], -torch.inf).amax(1)
    log_probs = F.log_softmax(logits, -1)
    wrong = (own <= others).nonzero().flatten()
    return Reading(
        lowest=float((own - others).min()),
        log_probability=float(log_probs.gather(1, target[:, None]).mean()),
        divergence=float(
            F.kl_div(log_probs, full_log_probs, log_target=True, reduction="none").sum(-1).clamp(min=0).mean()
        ),
        first_wrong=int(wrong[0]) if wrong.numel() else None,
    )


def read_sets(
    model: PreTrainedModel,
    full: CompressedCache,
    witness: Witness,
    first: Tensor,
    tail: Sequence[int],
    sets: Sequence[KeptSets],
    rows: int,
) -> list[Reading]:
    """The reference under each set, `rows` at a time. first: [1, vocabulary] logits behind what the full cache has read."""
    found: list[Reading] = []
    different, places = distinct(sets)
    for some in _split(different, rows_at_once(full, rows)):
        cache = with_sets(full, some)
        try:
            found += read_reference(model, cache, witness, first.expand(len(some), -1), tail)
        finally:
            cache.close()
    return [found[place] for place in places]


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
    different, places = distinct(sets)
    for some in _split(different, rows_at_once(full, rows)):
        cache = with_sets(full, some)
        try:
            begin = logits.expand(len(some), -1)
            if tail:
                ids = torch.tensor([list(tail)], device=model.device).expand(len(some), -1)
                begin = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            found += decode(model, cache, begin, stop)
        finally:
            cache.close()
    return [found[place] for place in places]


def distinct(sets: Sequence[KeptSets]) -> tuple[list[KeptSets], list[int]]:
    """The sets without repetition, and the place of each among them. Arms that differ in what an oracle replaces have the same replays."""
    known: dict[bytes, int] = {}
    different, places = list[KeptSets](), list[int]()
    for one in sets:
        key = hashlib.sha256(
            torch.cat([one[index].flatten() for index in sorted(one)]).cpu().numpy().tobytes()
        ).digest()
        if key not in known:
            known[key] = len(different)
            different.append(one)
        places.append(known[key])
    return different, places


def rows_at_once(full: CompressedCache, rows: int) -> int:
    """At most `rows`, and not more copies of the full cache than fit into MAX_COPIES; free memory is no measure, for a resumed run must
    make the same batches."""
    return max(1, min(rows, MAX_COPIES // max(sum(layer.nbytes for layer in full.compressed_layers), 1)))


def _split(sets: Sequence[KeptSets], rows: int) -> Iterator[Sequence[KeptSets]]:
    return (sets[start : start + rows] for start in range(0, len(sets), rows))
