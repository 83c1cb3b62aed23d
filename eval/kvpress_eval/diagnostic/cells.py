"""Cells: the scores of all arms on one task under one model at one budget, the unit of every statistic on signs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpress_eval.records import FULL, Record

Array = NDArray[np.float64]


class CellKey(NamedTuple):
    """What makes a cell: arXiv 2605.08234 section 2 has (task, model, budget, surface); our surface is the mode."""

    task: str
    length: int | None
    model: str
    budget: str
    mode: str


@dataclass(frozen=True)
class Cell:
    """Paired scores of one cell, in points (0 to 100).

    scores: contract name -> [n], aligned over contracts, "full" among them. samples, clusters: [n] names. coupling: phi of the task (see
    `coupling`), None where it is not known.
    """

    key: CellKey
    samples: tuple[str, ...]
    clusters: tuple[str, ...]
    scores: dict[str, Array]
    coupling: float | None = None

    @property
    def n(self) -> int:
        return len(self.samples)

    def mean(self, contract: str) -> float:
        """Mean score of a contract, in points."""
        return float(self.scores[contract].mean())


def make_cells(
    records: Iterable[Record], model: str, contracts: Sequence[str], couplings: dict[str, float] | None = None
) -> list[Cell]:
    """Cells of a run, in the order of their first record, over the samples that the full cache and all `contracts` answered.

    contracts: names without budget. couplings: phi of each task. Cells without a single such sample are left out.
    """
    found: dict[CellKey, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    full: dict[tuple[str, int | None, str], dict[str, float]] = defaultdict(dict)
    clusters: dict[tuple[str, int | None, str], str] = {}
    for record in records:
        clusters[record.task, record.length, record.sample] = record.cluster
        if record.arm == FULL:
            full[record.task, record.length, record.mode][record.sample] = 100 * record.score
        elif record.budget is not None and record.contract in contracts:
            key = CellKey(record.task, record.length, model, record.budget, record.mode)
            found[key][record.contract][record.sample] = 100 * record.score
    cells = []
    for key, by_contract in found.items():
        given = {FULL: full[key.task, key.length, key.mode], **by_contract}
        common = set.intersection(*(set(given.get(name, {})) for name in (FULL, *contracts)))
        samples = tuple(sorted(common))
        if samples:
            scores = {name: np.array([given[name][s] for s in samples]) for name in (FULL, *contracts)}
            names = tuple(clusters[key.task, key.length, s] for s in samples)
            cells.append(Cell(key, samples, names, scores, (couplings or {}).get(key.task)))
    return cells
