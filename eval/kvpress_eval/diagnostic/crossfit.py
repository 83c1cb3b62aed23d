"""Cross-fitting: two comparisons of a cell, such as its margin and its delta, on samples that they do not share.

m_c = full - host and delta_c = arm - host contain the same host score. Its noise moves both the same way, so their
signs agree more often than not even where arm and host are the same: with three scores of equal noise and no true
effect, a study of 96 cells shows gaps of 11 to 38 points and correlations of 0.17 to 0.50. Here the samples of a cell
are split in two, the first comparison is measured on one half and the second on the other, both ways round, over many
random splits.

How a cell is split (ours): whole clusters; clusters of like size are paired and a coin sends one of each pair to
either half, so that the halves differ by at most one cluster's size. Cells of one task and length over the same
samples, under other models or budgets, are split alike: what is a margin's sample in one is no delta's in another.

What is estimated: the expectation, over studies, of the statistic with m from n/2 samples and delta from n/2 others.
Over splits we pool before we divide: the rate of positive deltas among cells with positive margin is

    sum over cells and splits of [m > 0 and delta > 0]  /  sum over cells and splits of [m > 0],

in which a cell counts by how often its margin is positive. The mean over splits of each split's own rate is the
alternative. It is undefined as soon as one split leaves a group empty, gives a split with 3 cells in a group the
weight of one with 60, and its ratio is biased in each split, while the pooled ratio is biased only by its one
denominator.

Halves are noisier than wholes: a margin's sign is wrong more often, so a true gap shows up smaller than it is. That is
the price, and it is why the raw numbers stand beside these.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpress.errors import InputError
from kvpress_eval.diagnostic.cells import Array, Cell, CellKey
from kvpress_eval.diagnostic.margins import Comparison, difference
from kvpress_eval.statistics.strata import generator


@dataclass(frozen=True)
class LeftOut:
    """A cell that is not in the statistics, and why."""

    key: CellKey
    reason: str


@dataclass(frozen=True)
class Draws:
    """first, second: [n_cells, n_draws] values in points of the two comparisons; task: [n_cells] number of the task
    of each cell.

    Raw: one draw, both from all samples. Cross-fitted: two draws a split, the two ways round.
    """

    first: Array
    second: Array
    task: NDArray[np.intp]

    @property
    def n_tasks(self) -> int:
        return int(self.task.max()) + 1

    def only(self, chosen: NDArray[np.bool_]) -> Draws:
        """The cells where `chosen` [n_cells] is true, their tasks numbered anew."""
        kept = np.unique(self.task[chosen], return_inverse=True)[1]
        return Draws(self.first[chosen], self.second[chosen], kept)


@dataclass(frozen=True)
class Block:
    """Cells over the same samples. cells: [n] their numbers in the study; first, second: [n, n_clusters] sums of the
    two comparisons over each cluster, points; sizes: [n_clusters] samples. name: what its splits are seeded with."""

    cells: NDArray[np.intp]
    first: Array
    second: Array
    sizes: Array
    name: tuple[object, ...]

    def whole(self) -> tuple[Array, Array]:
        """[n, 1] means of both comparisons over all samples."""
        n = self.sizes.sum()
        return self.first.sum(1, keepdims=True) / n, self.second.sum(1, keepdims=True) / n

    def halves(self, repeats: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """[n, 2 * repeats] means of the first comparison over one half, and of the second over the other."""
        half = split(self.sizes, repeats, rng).astype(np.float64).T
        size = self.sizes @ half
        first, second = self.first @ half, self.second @ half
        rest = self.sizes.sum() - size
        other_first = self.first.sum(1, keepdims=True) - first
        other_second = self.second.sum(1, keepdims=True) - second
        return np.hstack([first / size, other_first / rest]), np.hstack([other_second / rest, second / size])


def split(sizes: Array, repeats: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """[repeats, n_clusters] of bool: which clusters, two or more, are in the first half."""
    n = len(sizes)
    by_size = np.argsort(rng.random((repeats, n)) - sizes, axis=1)  # equal sizes in random order
    coins = rng.integers(0, 2, size=(repeats, (n + 1) // 2)).astype(bool)
    dealt = np.stack([coins, ~coins], axis=2).reshape(repeats, -1)[:, :n]
    half = np.zeros((repeats, n), dtype=bool)
    np.put_along_axis(half, by_size, dealt, axis=1)
    return half


@dataclass(frozen=True)
class Study:
    """Two comparisons on all cells that have clusters enough. keys: [n_cells]; task: [n_cells] number of each cell's
    task."""

    keys: tuple[CellKey, ...]
    couplings: tuple[float | None, ...]
    task: NDArray[np.intp]
    blocks: tuple[Block, ...]
    left_out: tuple[LeftOut, ...]

    @classmethod
    def of(cls, cells: Sequence[Cell], first: Comparison, second: Comparison, min_clusters: int) -> Study:
        """Raises:
        InputError: no cell has `min_clusters` clusters, or one lacks a contract.
        """
        left_out, kept = [], []
        for cell in cells:
            n_clusters = len(set(cell.clusters))
            if n_clusters < min_clusters:
                reason = f"{n_clusters} clusters of samples, {min_clusters} are needed to split them in two"
                left_out.append(LeftOut(cell.key, reason))
            else:
                kept.append(cell)
        if not kept:
            raise InputError(
                f"none of {len(cells)} cells has {min_clusters} clusters of samples, so no margin can be measured apart "
                "from its delta; run more samples per task"
            )
        alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for number, cell in enumerate(kept):
            alike[cell.key.task, cell.key.length, cell.samples, cell.clusters].append(number)
        names = sorted({cell.key.task for cell in kept})
        return cls(
            keys=tuple(cell.key for cell in kept),
            couplings=tuple(cell.coupling for cell in kept),
            task=np.array([names.index(cell.key.task) for cell in kept]),
            blocks=tuple(_block(kept, numbers, first, second, name) for name, numbers in alike.items()),
            left_out=tuple(left_out),
        )

    @property
    def tasks(self) -> list[str]:
        """Names in the order of their numbers."""
        return sorted({key.task for key in self.keys})

    def raw(self) -> Draws:
        """Both comparisons from all samples."""
        return self._gather([block.whole() for block in self.blocks])

    def cross_fitted(self, repeats: int, seed: int) -> Draws:
        """Each comparison from the half that the other one has not seen; the splits depend on the seed and the
        samples alone."""
        return self._gather([block.halves(repeats, generator(seed, "split", *block.name)) for block in self.blocks])

    def _gather(self, pieces: Sequence[tuple[Array, Array]]) -> Draws:
        shape = len(self.keys), pieces[0][0].shape[1]
        first, second = np.empty(shape), np.empty(shape)
        for block, (one, other) in zip(self.blocks, pieces, strict=True):
            first[block.cells], second[block.cells] = one, other
        return Draws(first, second, self.task)


def _block(
    cells: Sequence[Cell], numbers: list[int], first: Comparison, second: Comparison, name: tuple[object, ...]
) -> Block:
    ones = [difference(cells[number], first) for number in numbers]
    others = [difference(cells[number], second) for number in numbers]
    return Block(
        cells=np.array(numbers),
        first=np.stack([stratum.sums for stratum in ones]),
        second=np.stack([stratum.sums for stratum in others]),
        sizes=ones[0].sizes,
        name=name,
    )
