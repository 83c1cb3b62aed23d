"""What the diagnostic measured on one sample under one arm, kept beside the arm's record (`Record.measures`).

Means over heads are over all layers and KV heads. "Decode queries" are those of a reference answer, read over the full
cache: the full cache's own answer where it is right, else the sample's. p* is their attention over the prompt, p_T that of
the prompt's last query, K the kept set.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from kvpress.errors import InputError
from kvpress_eval.records import Record

Stage = Literal["access", "value", "fit"]
Verdict = Literal["access", "value", "fit", "none", "undecided"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AccessMeasures(_Part):
    """Stage I, whether decode queries find what they read.

    tv_decode: total variation between the arm's own access law (its exposures, normalised) and p*, mean over decode steps
        and heads; None for a ranking that reads no attention. kept_decode: p*(K), the same means.
    tv_first, tv_phase, tv_fit: the two sides of Prop. 3 at the first decode step, TV(p*, tail_K) <= TV(p*, p_T) +
        TV(p_T, tail_K), where tail_K is p_T restricted to K and renormalised; tv_fit is eta_proj (eq. 7).
    gold_tokens: share of the evidence's tokens that are kept; gold_whole: share of the facts that are kept whole; gold_broken: of
        which some tokens but not all are kept; group_broken: share of heads in which some of the facts, but not all, are whole.
        All None where the benchmark names no evidence; group_broken also where there is one fact.
    """

    tv_decode: float | None
    kept_decode: float
    tv_first: float
    tv_phase: float
    tv_fit: float
    gold_tokens: float | None = None
    gold_whole: float | None = None
    gold_broken: float | None = None
    group_broken: float | None = None


class ValueMeasures(_Part):
    """Stage II, what the eviction does to the output of attention, |o_K - o| / |o|.

    predicted: for the prompt's last query, as a selector can know it; measured: mean over decode queries and heads;
    agreement: Spearman over heads between the two; by_layer: measured, one for each compressed layer; by_step: measured, one for each decode step.
    """

    predicted: float
    measured: float
    agreement: float | None
    by_layer: tuple[float, ...]
    by_step: tuple[float, ...]


class FitMeasures(_Part):
    """Stage III, what fitting the scores into the budget costs; means over layers, eps_lat and ties are sums.

    eps_lat: tokens of the budget that whole blocks cannot use. kept_mass: kept share of the evidence.
    """

    eps_lat: int
    ties: int
    kept_mass: float | None


class MarginMeasures(_Part):
    """How far the arm is from the reference answer, read token by token (teacher forcing).

    reference: whose words; the full cache's end with the token that ended its answer. whole: False where the reference was cut to
    `Measuring.max_reference`. lowest: over the answer's tokens the smallest logit of the token minus the largest of all others;
    above 0 greedy decoding says the reference. log_probability: mean over tokens. divergence: mean KL(full || arm) of the
    next-token distribution, in nats. first_wrong: index of the token at which greedy decoding leaves the reference, None if it does
    not. In query-aware mode the first token comes out of the prefill, and arms that share it share that token.
    """

    reference: Literal["full", "sample"]
    whole: bool
    lowest: float
    log_probability: float
    divergence: float
    first_wrong: int | None


class Replay(_Part):
    """One counterfactual: the same sample with a part of the arm replaced.

    name: "stored" (the arm's set, exact values), "evidence" (the oracle's access), "ranking" (and its ranking), "set" (and its set), "facts" (and the
        benchmark's evidence first), "chance" (as many tokens of each head exchanged at random as the first replay that repairs exchanges).
    lowest: logit margin as in MarginMeasures. score: of the text, None where it was not needed: the margin shows the reference, or an
        earlier replay repairs. repaired: whether the answer is right again, None where that was not looked at. exchanged: share of the arm's
        kept tokens that were exchanged.
    """

    name: Literal["stored", "evidence", "ranking", "set", "facts", "chance"]
    lowest: float
    score: float | None
    repaired: bool | None
    exchanged: float


class ExchangeMeasures(_Part):
    """What another ranking exchanges at the host's boundary, and what that does (arXiv 2605.08234 Lemma 1, section 2).

    exchanged: share of the host's kept tokens that the arm does not keep. near: share of the exchanged tokens, in and out, whose rank under the
    host is within a tenth of the kept count of the threshold; None where nothing is exchanged. gain: divergence of the host minus that of the arm,
    in nats; above 0 the exchange helped. chance: the same for as many tokens of each head exchanged at random, mean over draws; None
    where nothing is exchanged.
    """

    exchanged: float
    near: float | None
    gain: float
    chance: float | None


class UnitMeasures(_Part):
    """How well scores order single units by what leaving them out of the full cache does to the next tokens.

    n: units, each a run of neighbouring tokens taken out of every head. divergence: mean over the units of KL(full || without it), in nats; spearman, auc: of
    each ranking's score of the unit, a mean over heads of the unit's share of the head's scores, with that divergence; auc is for the half of
    the units with the larger one. None where one side does not vary.
    """

    n: int
    divergence: float
    spearman: dict[str, float | None]
    auc: dict[str, float | None]


class Finding(_Part):
    """Everything measured on one sample under one arm.

    kept: `pack_counts` of how many heads keep each token of the prompt; heads: out of how many. gold: [start, end) tokens of each fact in the
    prompt. value, margin: None for arms that evict while the answer is made: no single kept set is theirs. verdict: None where the arm was not tried (the full cache, and arms that the study leaves out). exchange: of arms that differ from the
    host in the ranking alone; units: of the host; both on a share of the samples only (`Measuring.boundary`).
    """

    access: AccessMeasures | None
    value: ValueMeasures | None
    fit: FitMeasures | None
    margin: MarginMeasures | None
    kept: str | None
    heads: int
    gold: tuple[tuple[int, int], ...] = ()
    verdict: Verdict | None = None
    replays: tuple[Replay, ...] = ()
    exchange: ExchangeMeasures | None = None
    units: UnitMeasures | None = None


def finding_of(record: Record) -> Finding | None:
    """The finding of a record, None where nothing was measured."""
    return Finding.model_validate(record.measures) if record.measures else None


def pack_counts(counts: NDArray[np.int64]) -> str:
    """Counts [n] of at most 65,535 as a short text."""
    return base64.b85encode(zlib.compress(counts.astype("<u2").tobytes(), 9)).decode()


def unpack_counts(text: str, n_tokens: int) -> NDArray[np.int64]:
    """Counts [n_tokens] from `pack_counts`.

    Raises:
        InputError: the text is none of it.
    """
    try:
        raw = zlib.decompressobj().decompress(base64.b85decode(text), 2 * n_tokens + 2)
    except (ValueError, zlib.error, binascii.Error):
        raw = b""
    if len(raw) != 2 * n_tokens:
        raise InputError(
            f"the kept tokens of a record are no packed counts of {n_tokens} tokens: measure the sample again"
        )
    return np.frombuffer(raw, "<u2").astype(np.int64)
