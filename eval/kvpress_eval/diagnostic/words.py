"""Verdicts, stages and replays in words, the same on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence

from kvpress_eval.diagnostic.finding import Finding, Replay, Verdict

STAGES = {"access": "I access", "value": "II value", "fit": "III fit"}

#: what a verdict means, for a legend
MEANING: dict[Verdict, str] = {
    "access": "the tokens that the answer reads were not in the evidence: the queries of the right answer repair it",
    "value": "the evidence was there, the scalar ranked it wrongly (or stored it wrongly): ranking by output change repairs it",
    "fit": "the scores were right, the kept set tore them apart: choosing single tokens, facts first, repairs it",
    "none": "nothing failed, or the full cache fails too",
    "undecided": "no replay repairs the answer, or exchanging as many tokens at random repairs it as well",
}

REPLAYS = {
    "stored": "the same tokens, values as in the full cache",
    "evidence": "+ the queries of the right answer as evidence",
    "ranking": "+ ranked by output change",
    "set": "+ single tokens, facts first",
    "chance": "as many tokens exchanged at random",
}


def verdict_sentence(arm: str, finding: Finding) -> str:
    """Why this arm lost this answer, in one sentence."""
    by_name = {one.name: one for one in finding.replays}
    if finding.verdict is None:
        return f"{arm} was not looked into: the study names the arms whose failures are replayed."
    if finding.verdict == "none":
        return f"{arm} did not lose this answer, or the full cache does not have it either."
    chance = by_name.get("chance")
    if finding.verdict == "undecided":
        if chance is not None and chance.repaired:
            return f"{arm} lost this answer, and exchanging {chance.exchanged:.0%} of its tokens at random brings it back: the cause is left open."
        return f"{arm} lost this answer, and no replay brings it back: at this budget even the oracle's set may be too small."
    name = next(one.name for one in finding.replays if one.repaired)
    told = {
        "stored": "its kept set is enough, but the values it stores are not those of the model",
        "evidence": "its evidence did not show what the answer reads",
        "ranking": "its evidence showed what the answer reads, but its ranking put other tokens first",
        "set": "its scores put the right tokens first, but they did not make it into the set",
    }[name]
    control = "" if chance is None or name == "stored" else f" {_control(chance)}"
    return f"{arm} lost this answer in stage {STAGES[finding.verdict]}: {told}.{control}"


def base_sentence(base: str, slots: Sequence[str], base_score: float, score: float, full_score: float) -> str:
    """What the contract that an arm differs from does with the same sample, in one sentence."""
    swap = " and ".join(slots)
    if base_score > score:
        has = "has the answer" if base_score >= full_score else "does better"
        return f"Its base {base} {has}: here the swap of {swap} lost it."
    if base_score < score:
        return f"Its base {base} does worse: the swap of {swap} helped here."
    return f"Its base {base} scores the same: the swap of {swap} changes nothing here."


def _control(chance: Replay) -> str:
    return f"As many tokens exchanged at random ({chance.exchanged:.0%}) do not bring it back."


def replay_rows(replays: Sequence[Replay]) -> list[tuple[str, str, str, str, str]]:
    """(what is replaced, tokens exchanged, logit margin, score, repaired) of each replay."""
    return [
        (
            REPLAYS[one.name],
            f"{one.exchanged:.0%}",
            f"{one.lowest:+.2f}".replace("-", "−"),
            "–" if one.score is None else f"{one.score:.2f}",
            "yes" if one.repaired else "no",
        )
        for one in replays
    ]
