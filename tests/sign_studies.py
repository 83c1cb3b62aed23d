"""Simulated studies of three noisy scores, as in the analysis of the shared-host artefact: what is true of them is
known."""

from __future__ import annotations

import numpy as np

from kvpress_eval.diagnostic.cells import Cell, CellKey

BUDGETS = ("5%", "10%")


def study(
    rng: np.random.Generator,
    *,
    n_tasks: int = 16,
    n_cells: int = 6,
    n_samples: int = 12,
    beta: float = 0.0,
    noise: float = 3.0,
    mean: float = 1.79,
    spread: float = 2.0,
) -> list[Cell]:
    """Cells with true margins N(mean, spread), true deltas beta * margin, and noise of each cell's three scores of sd
    `noise`, points."""
    names = tuple(str(number) for number in range(n_samples))
    cells = []
    for task in range(n_tasks):
        for place in range(n_cells):
            true = rng.normal(mean, spread)
            full, host, arm = rng.normal(0, noise * np.sqrt(n_samples), (3, n_samples))
            key = CellKey(f"t{task:02d}", None, f"m{place // 2}", BUDGETS[place % 2], "query_aware")
            cells.append(Cell(key, names, names, {"full": full + true, "host": host, "arm": arm + beta * true}))
    return cells


def right_or_wrong(rng: np.random.Generator, *, n_tasks: int = 12, n_cells: int = 4, n_samples: int = 20) -> list[Cell]:
    """Cells of scores 0 and 100 in which host and arm are alike, with tasks so easy or so hard that nearly everything
    ties."""
    names = tuple(str(number) for number in range(n_samples))
    cells = []
    for task in range(n_tasks):
        solved = rng.random(n_samples) < rng.beta(0.7, 0.7)
        lost = rng.choice([0.0, 0.02, 0.1, 0.3])
        for place in range(n_cells):
            host, arm = (
                100.0 * np.where(solved, rng.random(n_samples) >= lost, rng.random(n_samples) < 0.05) for _ in range(2)
            )
            key = CellKey(f"t{task:02d}", None, f"m{place // 2}", BUDGETS[place % 2], "query_aware")
            cells.append(Cell(key, names, names, {"full": 100.0 * solved, "host": host, "arm": arm}))
    return cells
