"""Which stage lost the answer: the arm's parts are replaced by an oracle's, one stage after the other, until the answer is back.

replay     what is replaced                                                    repairs -> verdict
stored     nothing but the stored values, by the exact ones                    value (the representation)
evidence   slots query_law and access: the queries of the right answer, plain  access
ranking    and slot ranking: the output change of leaving one unit out (MII)   value
set        and slots granularity, allocation, retention: single tokens by that fit
           ranking, the facts of the benchmark first

Budget and protection stay the arm's own. The first replay that repairs gives the verdict, in the paper's repair order (arXiv 2605.08234
section 1). Where none repairs, or where exchanging as many tokens at random repairs too, the verdict is "undecided".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpress.contract import Contract
from kvpress.evidence import UnitFeatures
from kvpress.selection import Problem, Scored, decide, score
from kvpress_eval.diagnostic.finding import Replay, Verdict
from kvpress_eval.diagnostic.measure import KeptSets
from kvpress_eval.diagnostic.witness import Witness

PLAIN_ACCESS = {"kind": "aggregate", "query_reducer": "mean", "head_reducer": "mean"}
#: verdict of the replays that replace a stage, in the order in which they are tried
VERDICTS: dict[str, Verdict] = {"stored": "value", "evidence": "access", "ranking": "value", "set": "fit"}


@dataclass(frozen=True)
class Counterfactuals:
    """Kept sets of the replays of one arm on one sample, by name; exchanged: share of the arm's kept tokens that each replaces."""

    sets: dict[str, KeptSets]
    exchanged: dict[str, float]


def oracle_contracts(contract: Contract) -> dict[str, Contract]:
    """The arm's contract with one stage after the other replaced. A ranking that reads no attention is given mass with the evidence."""
    blind = not contract.ranking.statistics
    # the oracle's queries are handed over as they are: the law only has to be one that keeps single queries at hand
    evidence = contract.swap(
        query_law="tail",
        schedule="end_of_prefill",
        access=PLAIN_ACCESS,
        **({"ranking": "mass"} if blind else {}),
    )
    ranking = evidence.swap(ranking="mii")
    fitted = ranking.swap(granularity="token", allocation="uniform", retention="top_k")
    return {"evidence": evidence, "ranking": ranking, "set": fitted}


def counterfactuals(
    contract: Contract,
    witness: Witness,
    kept: KeptSets,
    budgets: dict[int, int],
    facts: Sequence[tuple[int, int]],
    seed: int,
) -> Counterfactuals:
    """Kept sets of all replays.

    kept: the arm's own; budgets: tokens per head of each layer; facts: [start, end) tokens; seed: of the random exchange.
    """
    sets: dict[str, KeptSets] = {"stored": kept}
    for name, replaced in oracle_contracts(contract).items():
        first = facts if name == "set" else ()
        scored = [
            _facts_first(score(replaced, _problem(replaced, witness, index, place, budgets[index])), first)
            for place, index in enumerate(witness.layers)
        ]
        sets[name] = {
            index: _mask(decision.kept, witness.n_prompt, kept[index].device)
            for index, decision in zip(witness.layers, decide(replaced, scored), strict=True)
        }
    sets["chance"] = _by_chance(kept, sets["evidence"], seed)
    total = sum(int(mask.sum()) for mask in kept.values())
    exchanged = {
        name: sum(int((kept[index] & ~mask).sum()) for index, mask in chosen.items()) / max(total, 1)
        for name, chosen in sets.items()
    }
    return Counterfactuals(sets, exchanged)


def _problem(contract: Contract, witness: Witness, index: int, place: int, budget: int) -> Problem:
    layer = witness.layers[index]
    features = UnitFeatures(layer.spec, [layer.prompt], contract.granularity.block_size)
    return Problem(features, layer.answer, None, layer.last, layer.n_prompt, budget, place, len(witness.layers))


def _facts_first(scored: Scored, facts: Sequence[tuple[int, int]]) -> Scored:
    """The tokens of the facts above all others, in their own order."""
    if not facts:
        return scored
    scores = scored.scores.clone()
    lift = scores.max() - scores.min() + 1
    for start, end in facts:
        scores[:, start:end] += lift
    return replace(scored, scores=scores)


def _mask(kept: Sequence[Tensor], n_prompt: int, device: torch.device) -> Tensor:
    mask = torch.zeros(len(kept), n_prompt, dtype=torch.bool, device=device)
    for head, tokens in enumerate(kept):
        mask[head, tokens] = True
    return mask


def _by_chance(kept: KeptSets, evidence: KeptSets, seed: int) -> KeptSets:
    """The tokens that the oracle's evidence takes out, replaced by as many drawn from all that the arm had evicted."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for index, mask in kept.items():
        found[index] = new = mask.clone()
        for head in range(mask.shape[0]):
            out = (mask[head] & ~evidence[index][head]).nonzero().flatten()
            outside = (~mask[head]).nonzero().flatten()
            drawn = torch.randperm(outside.numel(), generator=generator)[: out.numel()].to(outside.device)
            new[head, out[: drawn.numel()]] = False
            new[head, outside[drawn]] = True
    return found


def verdict_of(replays: Sequence[Replay]) -> Verdict:
    """The stage of the first replay that repairs; "undecided" where none does, or where chance does too."""
    by_name = {one.name: one for one in replays}
    chance = by_name.get("chance")
    for name, verdict in VERDICTS.items():
        one = by_name.get(name)  # type: ignore[call-overload]
        if one is not None and one.repaired:
            return "undecided" if chance is not None and chance.repaired and name != "stored" else verdict
    return "undecided"
