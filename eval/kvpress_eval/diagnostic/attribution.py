"""Which stage lost the answer: the arm's parts are replaced by an oracle's, one stage after the other, until the answer is back.

replay     what is replaced                                                    repairs -> verdict
stored     nothing but the stored values, by the exact ones                    value (the representation)
evidence   slots query_law and access: the queries of the right answer, plain  access
ranking    and slot ranking: the output change of leaving one unit out (MII)   value
set        and slots granularity, allocation, retention: single tokens by that fit
           ranking; left out where the arm's set is made that way
facts      and the benchmark's evidence above everything else                  undecided: it fits, but not even the
                                                                               oracle's ranking finds it

Budget and protection stay the arm's own. The first replay that repairs gives the verdict, in the paper's repair order (arXiv 2605.08234
section 1). As a control as many tokens of each head as that replay exchanges are exchanged at random (chance); where most of the draws repair
too, or where nothing repairs, the verdict is "undecided".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpress.contract import Contract
from kvpress.evidence import LayerSpec, UnitFeatures
from kvpress.selection import Problem, Scored, decide, score
from kvpress_eval.diagnostic.finding import Replay, Verdict
from kvpress_eval.diagnostic.measure import KeptSets
from kvpress_eval.diagnostic.witness import Witness

PLAIN_ACCESS = {"kind": "aggregate", "query_reducer": "mean", "head_reducer": "mean"}
#: verdict of the replays that replace a stage, in the order in which they are tried
VERDICTS: dict[str, Verdict] = {
    "stored": "value",
    "evidence": "access",
    "ranking": "value",
    "set": "fit",
    "facts": "undecided",
}


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
    specs: dict[int, LayerSpec],
    kept: KeptSets,
    budgets: dict[int, int],
    facts: Sequence[tuple[int, int]],
) -> Counterfactuals:
    """Kept sets of all replays but chance.

    specs: of the arm's own layers, which know W_O where its ranking reads it. kept: the arm's own set; budgets: tokens per head of each
    layer; facts: [start, end) tokens.
    """
    sets: dict[str, KeptSets] = {"stored": kept}
    replaced = oracle_contracts(contract)
    for name, made in replaced.items():
        if name == "set" and made.id == replaced["ranking"].id:
            continue
        sets[name] = _decided(made, witness, specs, kept, budgets, ())
    if facts:
        sets["facts"] = _decided(replaced["set"], witness, specs, kept, budgets, facts)
    total = max(sum(int(mask.sum()) for mask in kept.values()), 1)
    exchanged = {
        name: sum(int((kept[index] & ~mask).sum()) for index, mask in chosen.items()) / total
        for name, chosen in sets.items()
    }
    return Counterfactuals(sets, exchanged)


def _decided(
    contract: Contract,
    witness: Witness,
    specs: dict[int, LayerSpec],
    kept: KeptSets,
    budgets: dict[int, int],
    facts: Sequence[tuple[int, int]],
) -> KeptSets:
    """What a contract keeps with the reference's queries as evidence."""
    scored = []
    for place, (index, layer) in enumerate(witness.layers.items()):
        features = UnitFeatures(specs[index], [layer.prompt], contract.granularity.block_size)
        problem = Problem(
            features, layer.answer, None, layer.last, layer.n_prompt, budgets[index], place, len(witness.layers)
        )
        scored.append(_facts_first(score(contract, problem), facts))
    decisions = zip(witness.layers, decide(contract, scored), strict=True)
    return {index: _mask(one.kept, witness.n_prompt, kept[index].device) for index, one in decisions}


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


def first_repair(replays: Sequence[Replay]) -> Replay | None:
    """The first replay that brings the answer back, in the order of VERDICTS; chance is none."""
    by_name = {one.name: one for one in replays}
    found = (by_name.get(name) for name in VERDICTS)  # type: ignore[call-overload]
    return next((one for one in found if one is not None and one.repaired), None)


def verdict_of(replays: Sequence[Replay]) -> Verdict:
    """The stage of the first replay that repairs; "undecided" where none does, or where chance does too."""
    repair = first_repair(replays)
    return "undecided" if repair is None or chance_repairs(replays) else VERDICTS[repair.name]


def chance_repairs(replays: Sequence[Replay]) -> bool:
    """Whether more than half of the random exchanges bring the answer back: one lucky draw is no evidence."""
    drawn = [bool(one.repaired) for one in replays if one.name == "chance"]
    return 2 * sum(drawn) > len(drawn)
