"""Which ranks a training pass sees: each layer, KV head and side draws its own, uniformly (the Matryoshka sampling of arXiv 2410.14731)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvpress.errors import InputError
from kvpress.matryoshka.bases import RANK_STEP, Ranks

#: the published schedule: d/8, 2d/8, ..., d
EIGHTHS = tuple(eighth / 8 for eighth in range(1, 9))


class Schedule:
    """The ranks that may be drawn for layers of these shapes ((KV heads, D, Dv) each).

    Raises:
        InputError: a share that gives no multiple of 8, or none that keeps everything (the bases would drift from the model).
    """

    def __init__(self, shapes: Sequence[tuple[int, int, int]], shares: Sequence[float] = EIGHTHS) -> None:
        if not shares or max(shares) != 1:
            raise InputError("a rank schedule must hold the share 1: without it the full rank is never trained")
        self.shapes = list(shapes)
        self.levels = {dim: _levels(dim, shares) for shape in shapes for dim in shape[1:]}

    def draw(self, seed: int, step: int) -> Ranks:
        """The ranks of a pass; the same for the same seed and step, so that a resumed training draws what it would have drawn."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)

        def table(side: int) -> tuple[tuple[int, ...], ...]:
            found = []
            for shape in self.shapes:
                levels = self.levels[shape[side]]
                chosen = torch.randint(len(levels), (shape[0],), generator=generator).tolist()
                found.append(tuple(levels[index] for index in chosen))
            return tuple(found)

        return Ranks(table(1), table(2))


def _levels(dim: int, shares: Sequence[float]) -> list[int]:
    levels = []
    for share in sorted(set(shares)):
        rank = dim * share
        if rank < 1 or abs(rank - round(rank)) > 1e-6 or round(rank) % RANK_STEP:
            raise InputError(
                f"a rank schedule with the share {share:g} does not divide {dim} dimensions into multiples of {RANK_STEP}: "
                f"use multiples of {RANK_STEP / dim:g}"
            )
        levels.append(round(rank))
    return levels
