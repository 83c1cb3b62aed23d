"""Verdicts, stages and replays in words, the same on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence

from kvpress_eval.diagnostic.attribution import chance_repairs, first_repair
from kvpress_eval.diagnostic.finding import Finding, Replay, Verdict

STAGES = {"access": "I access", "value": "II value", "fit": "III fit"}

#: what a verdict means, for a legend
MEANING: dict[Verdict, str] = {
    "access": "the tokens that the answer reads were not in the evidence: the queries of the right answer repair it",
    "value": "the evidence was there, the scalar ranked it wrongly (or stored it wrongly): ranking by output change repairs it",
    "fit": "the way into the budget lost it: the same ranking over single tokens repairs it",
    "none": "nothing failed, or the full cache fails too",
    "undecided": "no replay repairs it, or only forcing the benchmark's evidence in does, or chance does as well",
}

REPLAYS = {
    "stored": "the same tokens, values as in the full cache",
    "evidence": "+ the queries of the right answer as evidence",
    "ranking": "+ ranked by output change",
    "set": "+ single tokens by that ranking",
    "facts": "+ the benchmark's evidence first",
    "chance": "as many tokens exchanged at random",
}


def verdict_sentence(arm: str, finding: Finding) -> str:
    """Why this arm lost this answer, in one sentence or two."""
    if finding.verdict is None:
        return f"{arm} was not looked into: the study does not ask for it, or it goes on evicting while it answers."
    if finding.verdict == "none":
        return f"{arm} did not lose this answer, or the full cache does not have it either."
    repair = first_repair(finding.replays)
    chance = [one for one in finding.replays if one.name == "chance"]
    by_chance = sum(bool(one.repaired) for one in chance)
    if repair is None:
        return f"{arm} lost this answer, and no replay brings it back within its budget."
    if chance_repairs(finding.replays):
        return (
            f"{arm} lost this answer, and exchanging {repair.exchanged:.0%} of its tokens at random brings it back as well "
            f"({by_chance} of {len(chance)} draws): the cause is left open."
        )
    if repair.name == "facts":
        return (
            f"{arm} lost this answer; the evidence fits into its budget, but not even the oracle's ranking finds it: "
            f"the cause is left open."
        )
    told = {
        "stored": "its kept set is enough, but the values it stores are not those of the model",
        "evidence": "its evidence did not show what the answer reads",
        "ranking": "the evidence shows what the answer reads, but its ranking put other tokens first",
        "set": "ranked single tokens hold the answer, but its way of fitting them into the budget loses it",
    }[repair.name]
    how_often = "never" if not by_chance else f"in {by_chance} of {len(chance)} draws"
    control = (
        f" As many tokens exchanged at random ({repair.exchanged:.0%}) bring it back {how_often}." if chance else ""
    )
    return f"{arm} lost this answer in stage {STAGES[finding.verdict]}: {told}.{control}"


def base_sentence(base: str, slots: Sequence[str], base_score: float, score: float, full_score: float) -> str:
    """What the contract that an arm differs from does with the same sample, in one sentence."""
    swap = " and ".join(slots)
    if base_score == score:
        return f"Its base {base} scores the same."
    if base_score > score:
        has = "has the answer" if base_score >= full_score else "does better"
        return f"Its base {base} {has}: here the swap of {swap} costs {100 * (base_score - score):.0f} points."
    return f"Its base {base} does worse: here the swap of {swap} gains {100 * (score - base_score):.0f} points."


def replay_rows(replays: Sequence[Replay]) -> list[tuple[str, str, str, str, str]]:
    """(what is replaced, tokens exchanged, logit margin, score, repaired) of each replay."""
    return [
        (
            REPLAYS[one.name],
            f"{one.exchanged:.0%}",
            f"{one.lowest:+.2f}".replace("-", "−"),
            "–" if one.score is None else f"{one.score:.2f}",
            "not tried" if one.repaired is None else "yes" if one.repaired else "no",
        )
        for one in replays
    ]
