"""Does the sign of a margin predict the sign of what an arm does? The sign evaluation of arXiv 2605.08234 section 4.

    result = evaluate(cells, host="snapkv", arm="mii", settings=SignSettings(), seed=0)
    result.cross_fitted.rate_gap      # Quantity: value, low, high, n_cells, n_tasks
    result.raw.rate_gap               # the same, with the host's noise in both; never quote it alone
    result.artefact.raw["rate_gap"]   # what the raw split would show without any effect
    dataclasses.asdict(result)        # plain JSON

How to read it. `cross_fitted` is the finding; `raw` is comparable with published numbers, and its excess over
`artefact.raw[...].expected` is what is left of it. The favourable group are cells in which the full cache beats the
host, the unfavourable ones the rest; the prediction is that the arm helps in the first and not in the second. If the
interval of the cross-fitted gap holds 0, the margin's sign has not been shown to predict anything.

`table` has ties as a class of their own. Where many cells tie, read `win_gap`: the published `rate_gap` is then not 0
without an effect, even cross-fitted, because cells that tie throughout count as agreement (`artefact` shows by how
much). Binomial p values belong to the raw split alone: they take cells for independent and know nothing of the
artefact. Rates and gaps are in percent and percentage points, deltas in points of the score (0 to 100). No single
cell's sign means anything: its standard error is several times the usual effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from kvpress_eval.diagnostic.artefact import Artefact, simulate
from kvpress_eval.diagnostic.cells import Cell
from kvpress_eval.diagnostic.crossfit import Draws, LeftOut, Study
from kvpress_eval.diagnostic.label_permutation import PermutationNull, permute_labels
from kvpress_eval.diagnostic.leave_out import WithoutTask, leave_one_task_out
from kvpress_eval.diagnostic.margins import NEGATIVE, POSITIVE, TIE
from kvpress_eval.diagnostic.quantity import Quantity
from kvpress_eval.diagnostic.sign_settings import SignSettings
from kvpress_eval.diagnostic.tally import Tally, measured, tally
from kvpress_eval.records import FULL
from kvpress_eval.statistics.strata import generator


@dataclass(frozen=True)
class Group:
    """Cells whose margin is of one kind. positive, tied, negative: percent of them by class of delta; match: percent
    that do as predicted (a delta that is positive, in the favourable group; not positive, in the unfavourable one; of
    the same class, in the three); p: one-sided exact binomial of the match against one half, None but for raw groups
    of a sign."""

    name: str
    n_cells: float
    positive: Quantity
    tied: Quantity
    negative: Quantity
    mean_delta: Quantity
    match: Quantity
    p: float | None


@dataclass(frozen=True)
class Split:
    """All numbers of one way to measure. favourable: H > 0, unfavourable: H <= 0, ties included; table: the three
    classes of margins. See `tally.Tally` for what each number is."""

    n_cells: float
    n_tasks: int
    favourable: Group
    unfavourable: Group
    table: tuple[Group, Group, Group]
    rate_gap: Quantity
    win_gap: Quantity
    mean_gap: Quantity
    match: Quantity
    match_of_classes: Quantity
    correlation: Quantity
    permutation: PermutationNull
    without_task: tuple[WithoutTask, ...]


@dataclass(frozen=True)
class Both:
    """The two ways to measure side by side."""

    raw: Split
    cross_fitted: Split


@dataclass(frozen=True)
class Gaps:
    """What a threshold leaves. favourable, unfavourable: cells with m > threshold, and with m <= -threshold."""

    favourable: float
    unfavourable: float
    rate_gap: Quantity
    mean_gap: Quantity
    match: Quantity


@dataclass(frozen=True)
class AtThreshold:
    """Cells whose margin is at least `threshold` points away from zero: near zero a margin has no sign to speak of."""

    threshold: float
    raw: Gaps
    cross_fitted: Gaps


@dataclass(frozen=True)
class ByCoupling:
    """Tasks of low and of high coupling apart; None for a side without cells. n_unknown: cells without phi."""

    low: Both | None
    high: Both | None
    n_unknown: int


@dataclass(frozen=True)
class SignResult:
    """Everything about one arm against one host. artefact: None where no studies were simulated."""

    host: str
    arm: str
    seed: int
    settings: dict[str, object]
    raw: Split
    cross_fitted: Split
    thresholds: tuple[AtThreshold, ...]
    coupling: ByCoupling
    artefact: Artefact | None
    left_out: tuple[LeftOut, ...]


def evaluate(
    cells: Sequence[Cell], host: str, arm: str, *, settings: SignSettings | None = None, seed: int = 0
) -> SignResult:
    """Evaluate the signs of one arm against one host. Cells that cannot be split are left out of both splits, and
    named.

    Raises:
        InputError: no cell can be split, or one lacks a contract.
    """
    settings = settings or SignSettings()
    study = Study.of(cells, (FULL, host), (arm, host), settings.min_clusters)
    raw, crossed = study.raw(), study.cross_fitted(settings.repeats, seed)
    both = partial(_both, study, raw, crossed, settings=settings, seed=seed)
    phi = np.array([np.nan if each is None else each for each in study.couplings])
    low, high = phi < settings.low_coupling, phi >= settings.low_coupling
    everything = both(np.ones(len(phi), dtype=bool))
    return SignResult(
        host=host,
        arm=arm,
        seed=seed,
        settings=settings.model_dump(mode="json"),
        raw=everything.raw,
        cross_fitted=everything.cross_fitted,
        thresholds=tuple(
            AtThreshold(each, _gaps(raw, each, settings), _gaps(crossed, each, settings))
            for each in settings.thresholds
        ),
        coupling=ByCoupling(
            low=both(low) if low.any() else None,
            high=both(high) if high.any() else None,
            n_unknown=int(np.isnan(phi).sum()),
        ),
        artefact=simulate(study, settings, seed) if settings.n_studies else None,
        left_out=study.left_out,
    )


def _both(
    study: Study, raw: Draws, crossed: Draws, chosen: NDArray[np.bool_], *, settings: SignSettings, seed: int
) -> Both:
    return Both(
        _split(study, raw, chosen, exact=True, settings=settings, seed=seed),
        _split(study, crossed, chosen, exact=False, settings=settings, seed=seed),
    )


def _split(
    study: Study, draws: Draws, chosen: NDArray[np.bool_], *, exact: bool, settings: SignSettings, seed: int
) -> Split:
    part = draws.only(chosen)
    sums = tally(part, settings.tolerance)
    keys = [key for key, is_in in zip(study.keys, chosen, strict=True) if is_in]
    number = partial(measured, sums, confidence=settings.confidence)
    group = partial(_group, sums, exact=exact, confidence=settings.confidence)
    both, opposite = ("favourable", "unfavourable"), ("positive", "negative")
    return Split(
        n_cells=float(len(keys)),
        n_tasks=part.n_tasks,
        favourable=group("favourable", (POSITIVE,)),
        unfavourable=group("unfavourable", (TIE, NEGATIVE)),
        table=(group("positive", (POSITIVE,)), group("tie", (TIE,)), group("negative", (NEGATIVE,))),
        rate_gap=number("gap", lambda t: t.rate_gap, both),
        win_gap=number("gap", lambda t: t.win_gap, opposite),
        mean_gap=number("points", lambda t: t.mean_gap, both),
        match=number("share", lambda t: t.match, ("all",)),
        match_of_classes=number("share", lambda t: t.match_of_classes, ("all",)),
        correlation=number("correlation", lambda t: t.correlation, ("all",)),
        permutation=permute_labels(
            part,
            keys,
            settings.tolerance,
            generator(seed, "permutation"),
            n_permutations=settings.n_permutations,
            confidence=settings.confidence,
        ),
        without_task=leave_one_task_out(sums, sorted({key.task for key in keys})),
    )


def _group(sums: Tally, name: str, match: tuple[int, ...], *, exact: bool, confidence: float) -> Group:
    def share(outcomes: tuple[int, ...]) -> Quantity:
        return measured(sums, "share", lambda t: t.share(name, outcomes), (name,), confidence)

    whole = sums.total()
    n, hits = float(whole.cells(name)), float(whole.cells(name, match))
    has_p = exact and name != "tie" and n > 0
    return Group(
        name=name,
        n_cells=n,
        positive=share((POSITIVE,)),
        tied=share((TIE,)),
        negative=share((NEGATIVE,)),
        mean_delta=measured(sums, "points", lambda t: t.mean_delta(name), (name,), confidence),
        match=share(match),
        p=float(binomtest(round(hits), round(n), 0.5, alternative="greater").pvalue) if has_p else None,
    )


def _gaps(draws: Draws, threshold: float, settings: SignSettings) -> Gaps:
    sums = tally(draws, settings.tolerance, threshold)
    number = partial(measured, sums, confidence=settings.confidence)
    both = ("favourable", "unfavourable")
    favourable, unfavourable = (float(sums.total().cells(group)) for group in both)
    return Gaps(
        favourable=favourable,
        unfavourable=unfavourable,
        rate_gap=number("gap", lambda t: t.rate_gap, both),
        mean_gap=number("points", lambda t: t.mean_gap, both),
        match=number("share", lambda t: t.match, ("all",)),
    )
