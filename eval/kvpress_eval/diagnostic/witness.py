"""What the full cache saw: keys and values of the prompt, the prompt's last query, and the queries of a reference answer.

The reference answer is read token by token over the full cache (teacher forcing), so its queries are those of a model that
decodes that answer with nothing evicted: the decode law p* that a selector has to guess (arXiv 2605.08234 section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpress.cache import CompressedCache, join
from kvpress.cache.layer import CompressedLayer
from kvpress.evidence import HeadGroup, LayerSpec, Queries
from kvpress.selection import Decision, Scored
from kvpress_kernels.reference.window_scores import attention_probs


@dataclass(frozen=True)
class Law:
    """What an arm knew of one layer when it cut it, on the CPU.

    exposure: [H, U] its access law, not normalised: the attention mass as its access slot smooths and combines it, whatever its ranking
        makes of it; None where the ranking reads no attention. scores: [H, U]. starts: [H, U] first position of each unit; valid,
        protected: [H, U]. block_size: tokens of a unit. budget: tokens per head.
    """

    exposure: Tensor | None
    scores: Tensor
    starts: Tensor
    valid: Tensor
    protected: Tensor
    block_size: int
    budget: int
    eps_lat: int
    ties: int
    kept_mass: float | None


@dataclass
class Notes:
    """The observer of one arm's cache: the newest prompt query of each layer, and what each layer decided last."""

    last: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    laws: dict[int, Law] = field(default_factory=dict)

    def saw(self, layer: CompressedLayer, query: Tensor, first: int) -> None:
        if layer.storage.store is None or layer.seen <= (layer.plan.prompt_length or 0):
            self.last[layer.index] = (query[:, :, -1:].clone(), first + query.shape[2] - 1)

    def decided(self, layer: CompressedLayer, row: int, scored: Scored, decision: Decision) -> None:
        features = scored.problem.features
        self.laws[layer.index] = Law(
            exposure=None if scored.law is None else scored.law.float().cpu(),
            scores=scored.scores.float().cpu(),
            starts=features.starts.cpu(),
            valid=features.valid.cpu(),
            protected=scored.protected.cpu(),
            block_size=features.block_size,
            budget=scored.problem.budget,
            eps_lat=sum(decision.eps_lat),
            ties=decision.ties,
            kept_mass=decision.kept_mass,
        )


@dataclass(frozen=True)
class LayerWitness:
    """One layer in full. keys [H, N + m, D], values [H, N + m, Dv]: N prompt tokens, then what was read behind them; last: p_T's query;
    answer: those of the reference, all grouped [H, G, q, D]."""

    spec: LayerSpec
    keys: Tensor
    values: Tensor
    n_prompt: int
    last: Queries
    answer: Queries

    @property
    def prompt(self) -> HeadGroup:
        """The prompt's tokens as evidence reads them."""
        n = self.n_prompt
        return HeadGroup(self.keys[:, :n], self.values[:, :n], torch.arange(n, device=self.keys.device))

    def attention(self, queries: Queries, everything: bool = False) -> Tensor:
        """[H, G, q, n] attention of queries over the prompt, renormalised to it, or over `everything` that each may see."""
        n = self.keys.shape[1] if everything else self.n_prompt
        dtype = torch.float64 if self.keys.dtype == torch.float64 else torch.float32
        sinks = self.spec.sinks
        probs = attention_probs(
            queries.vectors.to(dtype), self.keys[:, :n].to(dtype), queries.positions, torch.arange(n, device=self.keys.device),
            self.spec.scale, self.spec.softcap, None if sinks is None else sinks.to(dtype),
        )  # fmt: skip
        return probs if everything else probs / probs.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)


@dataclass(frozen=True)
class Witness:
    """All compressed layers, by layer index. logits [m, vocabulary]: from which the reference's tokens are chosen, over the full cache."""

    reference: tuple[int, ...]
    layers: dict[int, LayerWitness]
    logits: Tensor

    @property
    def n_prompt(self) -> int:
        return next(iter(self.layers.values())).n_prompt


class _Queries:
    """An observer that keeps all queries."""

    def __init__(self) -> None:
        self.vectors: dict[int, Tensor] = {}

    def saw(self, layer: CompressedLayer, query: Tensor, first: int) -> None:
        self.vectors[layer.index] = query.clone()

    def decided(self, layer: CompressedLayer, row: int, scored: Scored, decision: Decision) -> None:
        raise AssertionError("a full cache decides nothing")


def bear_witness(
    model: PreTrainedModel,
    full: CompressedCache,
    notes: Notes,
    first: Tensor,
    tail: Sequence[int],
    reference: Sequence[int],
) -> Witness:
    """Read `tail` (what follows a context that was cut) and the reference over a copy of the full cache, which stays as it is.

    full: has read the prompt under the contract "full", observed by `notes`. first: [1, vocabulary] logits behind it. reference: ids, one or more.
    """
    cache, observer, n_prompt = join([full]), _Queries(), full.get_seq_length()
    cache.plan.observer = observer
    ids = torch.tensor([[*tail, *reference]], device=model.device)
    try:
        keep = len(reference) + (1 if tail else 0)
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits[0]
        logits = logits if tail else torch.cat([first.to(logits), logits])
        layers = {
            layer.index: _layer(layer, observer.vectors[layer.index], notes.last[layer.index], n_prompt, len(reference))
            for layer in cache.compressed_layers
        }
    finally:
        cache.close()
    return Witness(tuple(reference), layers, logits[:-1].float())


def _layer(layer: CompressedLayer, query: Tensor, last: tuple[Tensor, int], n_prompt: int, m: int) -> LayerWitness:
    groups = layer.storage.groups(0, layer.seen)
    keys, values = (torch.cat([getattr(g, name) for g in groups]) for name in ("keys", "values"))
    assert layer.spec is not None
    assert keys.shape[1] == layer.seen, "a full cache holds every token"
    shape, device = (layer.n_heads, layer.spec.group), keys.device
    answer = Queries(
        query[0, :, -m:].unflatten(0, shape), torch.arange(layer.seen - m, layer.seen, device=device), torch.ones(m, device=device)
    )  # fmt: skip
    end = Queries(
        last[0][0].unflatten(0, shape),
        torch.tensor([n_prompt - 1], device=device),
        torch.ones(1, device=device),
    )
    return LayerWitness(layer.spec, keys, values, n_prompt, end, answer)
