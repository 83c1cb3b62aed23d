"""Published numbers of the diagnostic (arXiv 2605.08234v1), as data, each with its table; and cells that have exactly
these counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from kvpress_eval.diagnostic.cells import Cell, CellKey

MODELS = ("qwen3", "llama", "mistral")
BUDGETS = ("5%", "10%")
#: Tables 1, 3: group -> cells, those with a positive lift of MII, mean lift (points), percent positive, one-sided p
GROUPS = {
    "favourable": (62, 45, 0.54, 72.6, 2.5e-4),
    "unfavourable": (34, 11, -0.44, 32.4, 2.9e-2),
}
#: Table 3: all cells: number, percent positive, mean lift
ALL = (96, 58.3, 0.20)
#: Table 12: rate gap and mean gap (pp), direction match (percent)
GAPS = {"rate_gap": 40.2, "mean_gap": 0.99, "match": 70.8}
#: Table 3: NoLev, percent positive and mean lift by group
NOLEV = {"all": (57.3, 0.15), "favourable": (69.4, 0.48), "unfavourable": (29.4, -0.34)}
#: Table 11: percent of the prediction by model, for margins above and not above zero, with cells that fit the percentages
BY_MODEL = {
    "llama": ((61.9, 13, 21), (54.5, 6, 11)),
    "mistral": ((80.0, 16, 20), (75.0, 9, 12)),
    "qwen3": ((76.2, 16, 21), (72.7, 8, 11)),
}
#: Table 10: (coupling, group) -> positive, negative ("nonpos"), tied lifts; percent positive; mean lift
COUPLING = {
    ("low", "favourable"): ((42, 10, 3), 76.4, 0.69),
    ("high", "favourable"): ((3, 3, 1), 42.9, -0.59),
    ("low", "unfavourable"): ((8, 9, 6), 34.8, -0.49),
    ("high", "unfavourable"): ((3, 8, 0), 27.3, -0.34),
}
#: Table 2, sample-disjoint, raw: percent of the prediction for m > 0 and m <= 0; the gap they make
DISJOINT = (64.0, 59.8, 24)
#: section 4 and Table 9: cells, signs that agree, residual matches MII, rescues, breaks; percentages as printed
LEVERAGE = {"n": 264, "agree": (239, 90.5), "residual": (162, 61.4), "rescues": 12, "breaks": 13}
#: Table 20: model, alpha, MII, (wins, losses, ties), NoLev, leverage, (rescues, breaks, taxes, support failures)
STRENGTH = [
    ("llama", 0.25, 0.015, (8, 5, 3), -0.158, 0.173, (2, 1, 1, 6)),
    ("llama", 0.50, -0.622, (5, 10, 1), -0.313, -0.309, (1, 2, 2, 9)),
    ("llama", 0.75, -0.481, (7, 8, 1), -0.435, -0.046, (0, 0, 5, 9)),
    ("qwen3", 0.25, 0.168, (8, 6, 2), 0.115, 0.053, (1, 1, 3, 7)),
    ("qwen3", 0.50, 0.450, (9, 5, 2), 0.464, -0.014, (0, 1, 4, 6)),
    ("qwen3", 0.75, 0.414, (8, 6, 2), 0.887, -0.473, (0, 3, 5, 5)),
]
#: the row of Table 20 whose support failures are not "neither scalar is better than the host"
STRENGTH_EXCEPTION = ("llama", 0.25)
#: Tables 4, 16: surface -> full cache minus surface (points), cells with positive margin, without
SURFACES = {
    "snapkv": (1.79, 62, 34),
    "adakv": (3.90, 76, 20),
    "pyramidkv": (4.37, 73, 23),
    "cake": (6.30, 78, 18),
    "h2o_debiased": (9.47, 83, 13),
    "h2o": (26.60, 91, 5),
}
#: Table 17, PyramidKV: percent of positive lifts with and without a positive margin
PYRAMID = (79.5, 56.5)
#: App. K.4: trajectories, budgets, monotone ones, those with a strict dip at 5 %; 10 %: wins, losses, ties, best or tied;
#: percent of the oracle's mean; mean of the best fixed budget
TRAJECTORIES = {
    "n": 36,
    "budgets": ("2%", "5%", "10%", "15%"),
    "monotone": 6,
    "dips": 12,
    "best_fixed": "10%",
    "outcome": (22, 10, 4),
    "best": 16,
    "of_oracle": 55.5,
    "mean": 1.066,
}
#: Table 21: contracts by the signs of MII on three models: all positive, negative, zero, mixed; the same of leverage
ACROSS_MODELS = ((6, 0, 1, 17), (0, 4, 6, 14))
#: Table 6: slot-set exact, exact hit; FullKV, SnapKV, MII-pooled, MII-QD; percent
NEEDLES = {
    "qwen3": ((100.0, 62.5, 66.7, 75.0), (37.5, 25.0, 37.5, 50.0)),
    "llama": ((100.0, 66.7, 50.0, 75.0), (75.0, 50.0, 37.5, 62.5)),
    "mistral": ((87.5, 54.2, 41.7, 66.7), (0.0, 0.0, 0.0, 50.0)),
}
NEEDLES_MEAN = ((95.8, 61.1, 52.8, 72.2), (37.5, 25.0, 25.0, 54.2))

N_SAMPLES = 4


def cell(key: CellKey, coupling: float | None = None, **means: float) -> Cell:
    """A cell with these mean scores, from samples that differ."""
    spread = np.array([-3.0, 1.0, 0.0, 2.0])
    names = tuple(str(number) for number in range(N_SAMPLES))
    return Cell(key, names, names, {name: mean + spread for name, mean in means.items()}, coupling)


def keys(n: int, models: Sequence[str] = MODELS, budgets: Sequence[str] = BUDGETS) -> Iterator[CellKey]:
    """Keys of n cells, task by task."""
    each = len(models) * len(budgets)
    for number in range(n):
        task, rest = divmod(number, each)
        model, budget = models[rest % len(models)], budgets[rest // len(models)]
        yield CellKey(f"task{task:02d}", None, model, budget, "query_aware")


def with_mean(signs: Iterable[int], mean: float) -> list[float]:
    """Values of these signs and of this mean, 0 for a sign of 0.

    All values of the commoner direction carry what is left over, so the signs stay as they are.
    """
    values = np.array([0.1 * sign for sign in signs])
    missing = mean * len(values) - values.sum()
    carry = values * missing > 0
    values[carry] += missing / carry.sum()
    return [float(value) for value in values]
