"""The three stages of one arm on one sample, measured against the witness; definitions are in `finding.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress.evidence import Queries
from kvpress_eval.diagnostic.finding import AccessMeasures, FitMeasures, ValueMeasures
from kvpress_eval.diagnostic.witness import Law, LayerWitness, Witness

#: layer index -> [H, N] bool: which tokens of the prompt each KV head keeps
KeptSets = dict[int, Tensor]


def access_measures(
    witness: Witness, kept: KeptSets, laws: dict[int, Law], facts: Sequence[tuple[int, int]], any_fact: bool = False
) -> AccessMeasures:
    """Stage I. laws: of the layers that were cut; facts: [start, end) tokens of each fact in the prompt; any_fact: one of them is enough."""
    rows: dict[str, list[float]] = {"tv_decode": [], "kept_decode": [], "tv_first": [], "tv_phase": [], "tv_fit": []}
    gold: list[GoldKept] = []
    for index, layer in witness.layers.items():
        stays = kept[index]
        decode = layer.attention(layer.answer)  # [H, G, m, N]
        last = layer.attention(layer.last)[:, :, 0]  # [H, G, N]
        first = decode[:, :, 0]
        inside = (last * stays[:, None]).sum(-1, keepdim=True)
        tail = last * stays[:, None] / inside.clamp(min=torch.finfo(last.dtype).tiny)
        lost = inside[..., 0] <= 0  # nothing of p_T is kept: by definition the distance is 1
        rows["kept_decode"].append(float((decode * stays[:, None, None]).sum(-1).mean()))
        rows["tv_first"].append(float(torch.where(lost, 1.0, _tv(first, tail)).mean()))
        rows["tv_phase"].append(float(_tv(first, last).mean()))
        rows["tv_fit"].append(float(torch.where(lost, 1.0, _tv(last, tail)).mean()))
        law = laws.get(index)
        if law is not None and law.exposure is not None:
            rows["tv_decode"].append(_law_distance(law, decode.mean((1, 2))))
        if facts:
            gold.append(gold_kept(stays, facts, any_fact))
    means = {name: _mean(values) for name, values in rows.items()}
    shares = {} if not gold else {
        "gold_tokens": _mean([one.tokens for one in gold]),
        "gold_whole": _mean([one.whole for one in gold]),
        "gold_broken": _mean([one.broken for one in gold]),
        "group_broken": _mean([one.group_broken for one in gold]) if len(facts) > 1 and not any_fact else None,
    }  # fmt: skip
    return AccessMeasures(**means, **shares)  # type: ignore[arg-type]


@dataclass(frozen=True)
class GoldKept:
    """Means over the heads of one layer; see AccessMeasures."""

    tokens: float
    whole: float
    broken: float
    group_broken: float


def gold_kept(stays: Tensor, facts: Sequence[tuple[int, int]], any_fact: bool = False) -> GoldKept:
    """What a layer's heads keep of the evidence. stays: [H, N] bool; facts: [start, end), one or more, none empty; any_fact: the
    facts are alternatives, and each head is judged by the one that it keeps most of."""
    share = torch.stack([stays[:, start:end].double().mean(1) for start, end in facts], 1)  # [H, facts]
    if any_fact:
        share = share.amax(1, keepdim=True)
        facts = [(0, 1)]  # one of them, whatever its length
    whole = share == 1
    n_tokens = torch.tensor([end - start for start, end in facts], dtype=torch.float64, device=stays.device)
    return GoldKept(
        tokens=float((share * n_tokens).sum(1).mean() / n_tokens.sum()),
        whole=float(whole.double().mean()),
        broken=float(((share > 0) & ~whole).double().mean()),
        group_broken=float((whole.any(1) & ~whole.all(1)).double().mean()),
    )


def _tv(p: Tensor, q: Tensor) -> Tensor:
    """Total variation over the last axis."""
    return (p - q).abs().sum(-1) / 2


def _law_distance(law: Law, decode: Tensor) -> float:
    """Mean over KV heads of TV(the arm's law, p*), p* [H, N] a mean over decode steps and the heads of a group; by unit.

    What an earlier eviction took has no unit any more, so all of its p* counts as missed.
    """
    assert law.exposure is not None
    distances, decode = [], decode.cpu()
    for head, target in enumerate(decode):
        real = law.valid[head] & (law.starts[head] < target.numel())  # a late cut also sees tokens of the answer
        starts, exposure = law.starts[head][real].contiguous(), law.exposure[head][real].to(target.dtype).clamp(min=0)
        tokens = torch.arange(target.numel())
        unit = (torch.searchsorted(starts, tokens, right=True) - 1).clamp(min=0)
        there = starts[unit] == tokens // law.block_size * law.block_size
        by_unit = torch.zeros_like(exposure).index_add_(0, unit[there], target[there])
        own = exposure / exposure.sum().clamp(min=torch.finfo(target.dtype).tiny)
        distances.append(float(_tv(own, by_unit)) + float(target[~there].sum()) / 2)
    return _mean(distances)  # type: ignore[return-value]


def value_measures(witness: Witness, kept: KeptSets) -> ValueMeasures:
    """Stage II: the relative change of the attention output, predicted with the prompt's last query and measured in decoding."""
    predicted, measured, steps = [], [], []
    for index, layer in witness.layers.items():
        at_end, in_decode = (_change(layer, kept[index], queries) for queries in (layer.last, layer.answer))
        predicted.append(at_end.mean((1, 2)))  # [H]
        measured.append(in_decode.mean((1, 2)))
        steps.append(in_decode.mean((0, 1)))  # [m]
    return ValueMeasures(
        predicted=float(torch.cat(predicted).mean()),
        measured=float(torch.cat(measured).mean()),
        agreement=spearman(torch.cat(predicted), torch.cat(measured)),
        by_layer=tuple(round(float(layer.mean()), 5) for layer in measured),
        by_step=tuple(round(float(step), 5) for step in torch.stack(steps).mean(0)),
    )


def _change(layer: LayerWitness, stays: Tensor, queries: Queries) -> Tensor:
    """[H, G, q] |o_K - o| / |o|; what was read behind the prompt is in every cache and stays."""
    probs = layer.attention(queries, everything=True)
    behind = torch.ones(stays.shape[0], probs.shape[-1] - layer.n_prompt, dtype=torch.bool, device=stays.device)
    weights = probs * torch.cat([stays, behind], 1)[:, None, None]
    values = layer.values.to(probs.dtype)[:, None]
    output = probs @ values
    # a learned sink takes its share of the attention and has no value
    sink = (1 - probs.sum(-1)).clamp(min=0) if layer.spec.sinks is not None else torch.zeros_like(probs[..., 0])
    tiny = torch.finfo(probs.dtype).tiny
    rest = weights @ values / (weights.sum(-1) + sink).clamp(min=tiny)[..., None]
    change: Tensor = (rest - output).norm(dim=-1) / output.norm(dim=-1).clamp(min=tiny)
    return change


def fit_measures(laws: dict[int, Law]) -> FitMeasures:
    """Stage III, from what each layer said when it was cut."""
    return FitMeasures(
        eps_lat=sum(law.eps_lat for law in laws.values()),
        ties=sum(law.ties for law in laws.values()),
        kept_mass=_mean([law.kept_mass for law in laws.values() if law.kept_mass is not None]),
    )


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Rank correlation; None where one side does not vary."""
    from scipy.stats import spearmanr

    if a.numel() < 3 or float(a.std()) == 0 or float(b.std()) == 0:
        return None
    return float(spearmanr(a.cpu().numpy(), b.cpu().numpy()).statistic)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
