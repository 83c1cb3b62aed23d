"""How a lift changes with the budget (arXiv 2605.08234 App. K.4): does more cache always help an arm against its host?

A trajectory is one (task, length, model, mode) over all budgets of the study; its value at a budget is first -
second, such as arm - host. With another baseline in the host's place it is the lift on that surface, with the full
cache the loss.

The oracle takes the best budget of each trajectory. The best of several noisy values is too good: its choice and its
value share their noise. So the oracle is also given with the choice made on one half of the samples and the value
read on the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpress.errors import ContractError, InputError
from kvpress.slots.budget import parse_budget
from kvpress_eval.diagnostic.cells import Array, Cell, CellKey
from kvpress_eval.diagnostic.crossfit import Draws, LeftOut, Study
from kvpress_eval.diagnostic.margins import Comparison, classes
from kvpress_eval.diagnostic.quantity import Quantity, mean_over_cells
from kvpress_eval.diagnostic.sign_settings import SignSettings


@dataclass(frozen=True)
class Trajectory:
    """values: points, one for each budget from the smallest up. dips: budgets at which it is strictly lower than at
    both neighbours."""

    task: str
    length: int | None
    model: str
    mode: str
    values: tuple[float, ...]
    rising: bool
    falling: bool
    dips: tuple[str, ...]


@dataclass(frozen=True)
class AtBudget:
    """One fixed budget for all trajectories. best: those for which no other budget is better, ties included."""

    budget: str
    mean: Quantity
    wins: int
    losses: int
    ties: int
    best: int
    dips: int


@dataclass(frozen=True)
class Trajectories:
    """rising, falling: never worse, never better with more budget, within the tolerance; monotone: either, so flat
    ones too.

    best_fixed: the budget of the highest mean. oracle: mean over trajectories of their best value; share_of_oracle:
    percent of it that the best fixed budget reaches, None where the oracle's mean is not positive. oracle_disjoint:
    the budget chosen on one half of the samples and read on the other.
    """

    first: str
    second: str
    budgets: tuple[str, ...]
    n: int
    rising: int
    falling: int
    monotone: Quantity
    n_monotone: int
    at_budget: tuple[AtBudget, ...]
    best_fixed: str
    oracle: Quantity
    oracle_disjoint: Quantity
    share_of_oracle: float | None
    each: tuple[Trajectory, ...]
    left_out: tuple[LeftOut, ...]


def trajectories(
    cells: Sequence[Cell], first: str, second: str, *, settings: SignSettings | None = None, seed: int = 0
) -> Trajectories:
    """Trajectories of first - second. Those that lack one of the study's budgets are left out and named.

    Raises:
        InputError: there are fewer than two budgets, they are not of one kind, or no trajectory has them all.
    """
    settings = settings or SignSettings()
    comparison: Comparison = first, second
    study = Study.of(cells, comparison, comparison, settings.min_clusters)
    budgets = by_size({key.budget for key in study.keys})
    if len(budgets) < 2:
        raise InputError(f"a trajectory needs two budgets or more, and the study has only '{budgets[0]}'")
    rows, left_out = _rows(study, budgets)
    names = [study.keys[row[0]] for row in rows]
    values = study.raw().first[rows, 0]
    task = np.array([study.task[row[0]] for row in rows])
    each = tuple(_trajectory(key, one, budgets, settings.tolerance) for key, one in zip(names, values, strict=True))
    monotone = np.array([one.rising or one.falling for one in each])
    at_budget = tuple(_at_budget(place, budgets, values, each, task, settings) for place in range(len(budgets)))
    best = int(np.argmax(values.mean(axis=0)))
    oracle = float(values.max(axis=1).mean())
    return Trajectories(
        first=first,
        second=second,
        budgets=tuple(budgets),
        n=len(rows),
        rising=sum(one.rising for one in each),
        falling=sum(one.falling for one in each),
        monotone=mean_over_cells("share", 100.0 * monotone, task, settings.confidence),
        n_monotone=int(monotone.sum()),
        at_budget=at_budget,
        best_fixed=budgets[best],
        oracle=mean_over_cells("points", values.max(axis=1), task, settings.confidence),
        oracle_disjoint=mean_over_cells(
            "points", _disjoint(study.cross_fitted(settings.repeats, seed), rows), task, settings.confidence
        ),
        share_of_oracle=100 * float(values[:, best].mean()) / oracle if oracle > settings.tolerance else None,
        each=each,
        left_out=(*study.left_out, *left_out),
    )


def by_size(budgets: set[str]) -> list[str]:
    """Budgets from the smallest to the largest.

    Raises:
        InputError: one is no budget, or they are not of one kind: 5% of a prompt and 512 tokens have no order.
    """
    try:
        parsed = {budget: parse_budget(budget) for budget in budgets}
    except ContractError as error:
        raise InputError(str(error)) from None
    if len({type(each) for each in parsed.values()}) > 1:
        raise InputError(
            f"budgets {', '.join(sorted(budgets))} are of several kinds and have no order; use one kind in a study"
        )
    return sorted(budgets, key=lambda budget: float(parsed[budget].model_dump()["value"]))


def _rows(study: Study, budgets: list[str]) -> tuple[NDArray[np.intp], list[LeftOut]]:
    """[n, n_budgets] numbers of the cells of each complete trajectory, and cells of the others."""
    found: dict[CellKey, dict[str, int]] = defaultdict(dict)
    for number, key in enumerate(study.keys):
        found[key._replace(budget="")][key.budget] = number
    rows, left_out = [], []
    for numbers in found.values():
        missing = [budget for budget in budgets if budget not in numbers]
        if missing:
            reason = f"its trajectory has no cell at {', '.join(missing)}"
            left_out += [LeftOut(study.keys[number], reason) for number in numbers.values()]
        else:
            rows.append([numbers[budget] for budget in budgets])
    if not rows:
        raise InputError(f"no task was run at all of the budgets {', '.join(budgets)}; run the missing ones")
    return np.array(rows), left_out


def _trajectory(key: CellKey, values: Array, budgets: list[str], tolerance: float) -> Trajectory:
    steps = classes(np.diff(values), tolerance)
    dips = [budgets[place + 1] for place in range(len(steps) - 1) if steps[place] < 0 < steps[place + 1]]
    return Trajectory(
        task=key.task,
        length=key.length,
        model=key.model,
        mode=key.mode,
        values=tuple(float(value) for value in values),
        rising=bool((steps >= 0).all()),
        falling=bool((steps <= 0).all()),
        dips=tuple(dips),
    )


def _at_budget(
    place: int,
    budgets: list[str],
    values: Array,
    each: tuple[Trajectory, ...],
    task: NDArray[np.intp],
    settings: SignSettings,
) -> AtBudget:
    outcome = classes(values[:, place], settings.tolerance)
    return AtBudget(
        budget=budgets[place],
        mean=mean_over_cells("points", values[:, place], task, settings.confidence),
        wins=int((outcome > 0).sum()),
        losses=int((outcome < 0).sum()),
        ties=int((outcome == 0).sum()),
        best=int((values[:, place] >= values.max(axis=1) - settings.tolerance).sum()),
        dips=sum(budgets[place] in one.dips for one in each),
    )


def _disjoint(draws: Draws, rows: NDArray[np.intp]) -> Array:
    """[n] mean over splits of the value at the budget that looked best on the other half."""
    chosen = np.argmax(draws.first[rows], axis=1)[:, None, :]
    return np.asarray(np.take_along_axis(draws.second[rows], chosen, axis=1)[:, 0].mean(axis=1))
