"""All answers of one mode, by arm and budget, and what they have in common."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from kvpress.errors import InputError
from kvpress_eval.diagnostic.cells import Array
from kvpress_eval.diagnostic.finding import Finding, Stage
from kvpress_eval.diagnostic.report.runs import Run
from kvpress_eval.diagnostic.study import Comparison, Study
from kvpress_eval.diagnostic.trajectories import by_size
from kvpress_eval.records import FULL, Mode, Record
from kvpress_eval.statistics import Pairs, Stratum, pair

STAGE_ORDER: tuple[Stage, ...] = ("access", "value", "fit")


class Place(NamedTuple):
    """Where an answer belongs to; answers of two models on one task are one stratum of it, on the same clusters."""

    model: str
    task: str
    length: int | None


class Measured(NamedTuple):
    """A record with its finding. cluster: of the sample, named for all tasks."""

    place: Place
    record: Record
    finding: Finding
    cluster: tuple[str, int | None, str]


@dataclass(frozen=True)
class Grid:
    """The records of one mode. budgets: from the smallest up where they have an order."""

    mode: Mode
    runs: tuple[Run, ...]
    budgets: tuple[str, ...]

    @property
    def study(self) -> Study:
        return self.runs[0].study

    @property
    def host(self) -> str:
        return self.study.host_name

    @property
    def comparisons(self) -> list[Comparison]:
        """The null arm, then by stage, the oracle last in its own; else in the study's order."""
        return sorted(
            self.study.comparisons,
            key=lambda each: (each.role != "null", STAGE_ORDER.index(each.stage), each.role == "oracle"),
        )

    @property
    def arms(self) -> list[str]:
        """The host, then every arm in the order of `comparisons`."""
        return [self.host, *(each.arm for each in self.comparisons)]

    def name(self, arm: str) -> str:
        """An arm as it is shown: a transfer says that it is one."""
        is_transfer = any(each.arm == arm and not each.is_diagnostic for each in self.study.comparisons)
        return f"{arm} (transfer)" if is_transfer else arm

    @property
    def scopes(self) -> list[str | None]:
        """None for all budgets together, then each of them; one budget alone needs no such row."""
        return [None, *self.budgets] if len(self.budgets) > 1 else list(self.budgets)

    @property
    def overall(self) -> str | None:
        """The scope of everything."""
        return self.scopes[0]

    @cached_property
    def answers(self) -> dict[tuple[str, str | None], dict[Place, dict[str, Record]]]:
        """Records by (arm, budget), place and sample."""
        found: dict[tuple[str, str | None], dict[Place, dict[str, Record]]] = defaultdict(lambda: defaultdict(dict))
        for run in self.runs:
            for record in run.records:
                if record.mode == self.mode:
                    name = FULL if record.arm == FULL else record.contract
                    found[name, record.budget][Place(run.model, record.task, record.length)][record.sample] = record
        return found

    def pairs(self, arm: str, base: str, scope: str | None) -> list[tuple[Place, Pairs]]:
        """Scores of two arms on their common samples; `Pairs.full` are those of the base. scope: a budget, or None for all."""
        found = []
        for budget in self.budgets if scope is None else (scope,):
            first, second = (self.answers.get((name, None if name == FULL else budget), {}) for name in (base, arm))
            for place in sorted(first.keys() & second.keys(), key=lambda place: (*place[:2], place.length or 0)):
                pairs = pair(first[place].values(), second[place].values())
                if len(pairs):
                    found.append((place, pairs))
        return found

    def measured(self, arm: str, scope: str | None) -> Iterator[Measured]:
        """Records with findings of an arm at a budget, or at all."""
        findings = {run.model: run.findings for run in self.runs}
        for budget in self.budgets if scope is None else (scope,):
            for place, records in self.answers.get((arm, budget), {}).items():
                for record in records.values():
                    finding = findings[place.model].get(record.key)
                    if finding is not None:
                        yield Measured(place, record, finding, (place.task, place.length, record.cluster))


def make_grids(runs: tuple[Run, ...]) -> list[Grid]:
    """One grid for each mode, in the study's order; budgets are those of the records.

    Raises:
        InputError: there are no records of any arm of the study.
    """
    arms = {runs[0].study.host_name, *(each.arm for each in runs[0].study.comparisons)}
    budgets: dict[Mode, dict[str, None]] = {mode: {} for mode in runs[0].study.modes}
    for run in runs:
        for record in run.records:
            of_mode = budgets.setdefault(record.mode, {})
            if record.budget is not None and record.contract in arms:
                of_mode[record.budget] = None
    if not any(budgets.values()):
        raise InputError("the run holds no records of any arm of its study, so there is nothing to compare; resume it")
    return [Grid(mode, runs, _ordered(list(found))) for mode, found in budgets.items() if found]


def _ordered(budgets: list[str]) -> tuple[str, ...]:
    try:
        return tuple(by_size(set(budgets)))
    except InputError:  # budgets of several kinds have no order
        return tuple(sorted(budgets))


def strata(found: Sequence[tuple[Place, Pairs]], values: Callable[[Pairs], Array]) -> list[Stratum]:
    """One stratum for each task and length: a sample's values under several models and budgets are one cluster of it."""
    grouped: dict[tuple[str, int], tuple[list[float], list[str]]] = defaultdict(lambda: ([], []))
    for place, pairs in found:
        of_task = grouped[place.task, place.length or 0]
        of_task[0].extend(values(pairs).tolist())
        of_task[1].extend(pairs.clusters)
    return [Stratum.of(*grouped[key]) for key in sorted(grouped)]
