"""Cells and signs of every arm whose base is the host; the null arm goes through the same and stands first, as calibration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from kvpress.errors import InputError
from kvpress_eval.diagnostic.cells import Cell, CellKey, make_cells
from kvpress_eval.diagnostic.finding import Stage
from kvpress_eval.diagnostic.leverage import Leverage, leverage
from kvpress_eval.diagnostic.margins import Comparison, difference
from kvpress_eval.diagnostic.report.grid import Grid
from kvpress_eval.diagnostic.report.means import Mean, mean
from kvpress_eval.diagnostic.sign_settings import SignSettings
from kvpress_eval.diagnostic.signs import SignResult, evaluate
from kvpress_eval.diagnostic.trajectories import Trajectories, trajectories
from kvpress_eval.records import FULL, Mode

#: budgets from which the way a lift takes over them says something
MIN_BUDGETS = 3


@dataclass(frozen=True)
class CellRow:
    """One cell of one arm, points. margin: full - host, delta: arm - host, over all samples; errors: standard errors by cluster, None for one
    cluster. Both contain the same host score."""

    key: CellKey
    arm: str
    n: int
    n_clusters: int
    full: float
    host: float
    score: float
    margin: float
    margin_error: float | None
    delta: float
    delta_error: float | None
    coupling: float | None


@dataclass(frozen=True)
class SignRow:
    """The sign evaluation of one arm at one budget, None for all. result: None where there is none, and `reason` says why. Its artefact
    is there for all budgets together."""

    mode: Mode
    budget: str | None
    arm: str
    stage: Stage
    label: str
    role: str
    result: SignResult | None
    reason: str


@dataclass(frozen=True)
class LeverageRow:
    """MII against NoLev in one mode."""

    mode: Mode
    result: Leverage | None
    reason: str


@dataclass(frozen=True)
class TrajectoryRow:
    """One arm's lift over the budgets."""

    mode: Mode
    arm: str
    label: str
    role: str
    result: Trajectories | None
    reason: str


@dataclass(frozen=True)
class CouplingRow:
    """One task and arm: phi, None where it is not known, and the mean delta in points over its samples, models and budgets."""

    mode: Mode
    task: str
    arm: str
    phi: float | None
    delta: Mean


@dataclass(frozen=True)
class Signs:
    """Everything on signs in one mode."""

    cells: list[CellRow]
    signs: list[SignRow]
    leverage: list[LeverageRow]
    trajectories: list[TrajectoryRow]
    couplings: list[CouplingRow]


def sign_rows(grid: Grid, settings: SignSettings, seed: int) -> Signs:
    """All arms whose base is the host."""
    found = Signs([], [], [], [], [])
    for each in grid.comparisons:
        if each.base != grid.host:
            continue
        cells = cells_of(grid, (grid.host, each.arm))
        found.cells.extend(_cell_row(cell, grid.host, each.arm) for cell in cells)
        found.couplings.extend(_coupling_rows(grid, cells, each.arm))
        for scope in grid.scopes:
            chosen = [cell for cell in cells if scope in (None, cell.key.budget)]
            # the artefact is simulated once for an arm: for each budget as well it would take most of a report's time
            of_scope = settings if scope == grid.overall else settings.model_copy(update={"n_studies": 0})
            result, reason = _evaluated(chosen, grid.host, each.arm, of_scope, seed)
            found.signs.append(SignRow(grid.mode, scope, each.arm, each.stage, each.label, each.role, result, reason))
        if len(grid.budgets) >= MIN_BUDGETS:
            way, reason = _trajectories(cells, each.arm, grid.host, settings, seed)
            found.trajectories.append(TrajectoryRow(grid.mode, each.arm, each.label, each.role, way, reason))
    both = leverage_arms(grid)
    if both is not None:
        found.leverage.append(_leverage_row(grid, *both, settings, seed))
    return found


def cells_of(grid: Grid, contracts: Sequence[str]) -> list[Cell]:
    """Cells of all models in the grid's mode, over the samples that the full cache and all contracts answered."""
    return [
        cell
        for run in grid.runs
        for cell in make_cells(
            (record for record in run.records if record.mode == grid.mode), run.model, contracts, run.couplings
        )
    ]


def leverage_arms(grid: Grid) -> tuple[str, str] | None:
    """NoLev and MII in one space of values, each the host but for its ranking; None where one is not there."""
    by_space: dict[object, dict[str, str]] = defaultdict(dict)
    for each in grid.study.comparisons:
        ranking = grid.study.contract(each.arm).ranking
        if each.base == grid.host and each.slots == ("ranking",) and ranking.kind in ("nolev", "mii"):
            by_space[getattr(ranking, "norm_space", None)].setdefault(ranking.kind, each.arm)
    return next(((arms["nolev"], arms["mii"]) for arms in by_space.values() if len(arms) == 2), None)


def _cell_row(cell: Cell, host: str, arm: str) -> CellRow:
    comparisons: tuple[Comparison, ...] = (FULL, host), (arm, host)
    margin, delta = (difference(cell, each) for each in comparisons)
    n = delta.n_clusters
    errors = [sqrt(one.variance * n / (n - 1)) if n > 1 else None for one in (margin, delta)]
    return CellRow(
        key=cell.key,
        arm=arm,
        n=cell.n,
        n_clusters=n,
        full=cell.mean(FULL),
        host=cell.mean(host),
        score=cell.mean(arm),
        margin=margin.mean,
        margin_error=errors[0],
        delta=delta.mean,
        delta_error=errors[1],
        coupling=cell.coupling,
    )


def _evaluated(
    cells: Sequence[Cell], host: str, arm: str, settings: SignSettings, seed: int
) -> tuple[SignResult | None, str]:
    if not cells:
        return None, "no sample has records of the full cache, the host and this arm"
    try:
        return evaluate(cells, host, arm, settings=settings, seed=seed), ""
    except InputError as error:
        return None, str(error)


def _trajectories(
    cells: Sequence[Cell], arm: str, host: str, settings: SignSettings, seed: int
) -> tuple[Trajectories | None, str]:
    if not cells:
        return None, "no sample has records of the full cache, the host and this arm"
    try:
        return trajectories(cells, arm, host, settings=settings, seed=seed), ""
    except InputError as error:
        return None, str(error)


def _leverage_row(grid: Grid, nolev: str, mii: str, settings: SignSettings, seed: int) -> LeverageRow:
    cells = cells_of(grid, (grid.host, nolev, mii))
    if not cells:
        return LeverageRow(grid.mode, None, f"no sample has records of the full cache, the host, '{nolev}' and '{mii}'")
    try:
        return LeverageRow(grid.mode, leverage(cells, grid.host, nolev, mii, settings=settings, seed=seed), "")
    except InputError as error:
        return LeverageRow(grid.mode, None, str(error))


def _coupling_rows(grid: Grid, cells: Sequence[Cell], arm: str) -> list[CouplingRow]:
    """One row for each task; phi of several models is that of the first which knows it."""
    found = []
    for task in dict.fromkeys(cell.key.task for cell in cells):
        of_task = [cell for cell in cells if cell.key.task == task]
        phi = next((cell.coupling for cell in of_task if cell.coupling is not None), None)
        deltas = [value for cell in of_task for value in (cell.scores[arm] - cell.scores[grid.host]).tolist()]
        clusters = [(cell.key.length, cluster) for cell in of_task for cluster in cell.clusters]
        found.append(CouplingRow(grid.mode, task, arm, phi, mean(deltas, clusters, (-100.0, 100.0))))
    return found
