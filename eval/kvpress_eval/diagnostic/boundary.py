"""The boundary of the kept set: what other rankings exchange there, and how well scores order single units.

Only units near the threshold decide between two rankings (arXiv 2605.08234 Lemma 1), so an exchange that follows a better ranking should help
where an exchange of as many random tokens hurts; and leaving single units out of the full cache says which order would have been right (Table 19).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress_eval.diagnostic.finding import ExchangeMeasures, UnitMeasures
from kvpress_eval.diagnostic.measure import KeptSets, spearman
from kvpress_eval.diagnostic.replay import Reading
from kvpress_eval.diagnostic.witness import Law, Witness

#: share of the kept count on either side of the threshold that counts as near it
BAND = 0.1


def exchange_at_random(host: KeptSets, arm: KeptSets, laws: dict[int, Law], seed: int) -> KeptSets:
    """As many tokens of each head as the arm exchanges, drawn from all unprotected kept ones and all evicted ones."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for index, mask in host.items():
        found[index] = new = mask.clone()
        free = ~protected_tokens(laws[index], mask)
        for head in range(mask.shape[0]):
            count = int((mask[head] & ~arm[index][head]).sum())
            out = _draw((mask[head] & free[head]).nonzero().flatten(), count, generator)
            new[head, out] = False
            new[head, _draw((~mask[head]).nonzero().flatten(), out.numel(), generator)] = True
    return found


def exchange_measures(
    host: KeptSets,
    arm: KeptSets,
    laws: dict[int, Law],
    host_reading: Reading,
    reading: Reading,
    drawn: Sequence[Reading],
) -> ExchangeMeasures:
    """laws: of the host; drawn: readings of exchanges at random, none where nothing is exchanged."""
    taken = exchanged = near = 0
    for index, mask in host.items():
        distance = _distance_to_threshold(laws[index], mask)
        moved = mask ^ arm[index]
        taken += int((mask & ~arm[index]).sum())
        exchanged += int(moved.sum())
        near += int((moved & (distance <= BAND * mask.sum(1, keepdim=True))).sum())
    chance = None
    if drawn:
        chance = host_reading.divergence - sum(one.divergence for one in drawn) / len(drawn)
    return ExchangeMeasures(
        exchanged=taken / max(sum(int(mask.sum()) for mask in host.values()), 1),
        near=near / exchanged if exchanged else None,
        gain=host_reading.divergence - reading.divergence,
        chance=chance,
    )


def choose_units(host: KeptSets, laws: dict[int, Law], width: int, count: int, seed: int) -> list[tuple[int, int]]:
    """[start, end) of units of `width` tokens: half of them those that the host's heads agree on least, half drawn from the rest.

    The prompt's protected ends are left out.
    """
    n_tokens = next(iter(host.values())).shape[1]
    share = torch.cat([mask.double() for mask in host.values()]).mean(0)
    shielded = torch.cat([protected_tokens(laws[index], mask) for index, mask in host.items()]).any(0)
    units = [
        (start, start + width)
        for start in range(0, n_tokens - width + 1, width)
        if not bool(shielded[start : start + width].any())
    ]
    doubt = torch.tensor([float((share[a:b] * (1 - share[a:b])).mean()) for a, b in units])
    order = doubt.argsort(descending=True, stable=True).tolist()
    first, rest = order[: count // 2], order[count // 2 :]
    drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[: count - len(first)].tolist()
    return [units[i] for i in sorted([*first, *(rest[i] for i in drawn)])]


def without_unit(witness: Witness, unit: tuple[int, int]) -> KeptSets:
    """The whole prompt but one unit."""
    kept = {}
    for index, layer in witness.layers.items():
        kept[index] = torch.ones(layer.keys.shape[0], layer.n_prompt, dtype=torch.bool, device=layer.keys.device)
        kept[index][:, unit[0] : unit[1]] = False
    return kept


def unit_measures(
    units: Sequence[tuple[int, int]], readings: Sequence[Reading], laws: dict[str, dict[int, Law]], n_prompt: int
) -> UnitMeasures:
    """laws: of each ranking, by name, over units of one token; readings: the reference without each unit."""
    divergence = torch.tensor([one.divergence for one in readings], dtype=torch.float64)
    large = divergence > divergence.median()
    scores = {name: _unit_scores(units, found, n_prompt) for name, found in laws.items()}
    return UnitMeasures(
        n=len(units),
        divergence=float(divergence.mean()) if len(units) else 0.0,
        spearman={name: spearman(score, divergence) for name, score in scores.items()},
        auc={name: _auc(score, large) for name, score in scores.items()},
    )


def _unit_scores(units: Sequence[tuple[int, int]], laws: dict[int, Law], n_prompt: int) -> Tensor:
    """Mean over layers and heads of the unit's share of the scores that the head gives to what is up for decision, [units]."""
    total = torch.zeros(n_prompt, dtype=torch.float64)
    for law in laws.values():
        scores = law.scores[:, :n_prompt].double()
        scores = scores - scores.amin(1, keepdim=True).clamp(max=0)  # a score may be negative; a share may not
        scores = scores.masked_fill(law.protected[:, :n_prompt], 0)
        total += (scores / scores.sum(1, keepdim=True).clamp(min=1e-300)).mean(0)
    return torch.stack([total[a:b].sum() for a, b in units]) if units else total[:0]


def _auc(scores: Tensor, positive: Tensor) -> float | None:
    """Probability that a positive unit scores higher than another one; ties count half. None where one class is empty."""
    above, below = scores[positive], scores[~positive]
    if not above.numel() or not below.numel():
        return None
    difference = above[:, None] - below[None]
    return float(((difference > 0).double() + 0.5 * (difference == 0)).mean())


def protected_tokens(law: Law, like: Tensor) -> Tensor:
    """[H, N] bool: tokens of protected units, on the device of `like` [H, N]."""
    found = torch.zeros(like.shape, dtype=torch.bool)
    tokens = torch.arange(like.shape[1])
    for head in range(like.shape[0]):
        starts, shielded = law.starts[head][law.valid[head]], law.protected[head][law.valid[head]]
        found[head] = shielded[torch.searchsorted(starts.contiguous(), tokens, right=True) - 1]
    return found.to(like.device)


def _distance_to_threshold(law: Law, mask: Tensor) -> Tensor:
    """[H, N] how many unprotected units lie between each token and the host's threshold, by rank; units of one token."""
    free = ~protected_tokens(law, mask)
    scores = law.scores[:, : mask.shape[1]].to(mask.device).double().masked_fill(~free, -torch.inf)
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    kept = (mask & free).sum(1, keepdim=True)
    return torch.where(rank < kept, kept - 1 - rank, rank - kept)


def _draw(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return tokens[torch.randperm(tokens.numel(), generator=generator)[:count].to(tokens.device)]
