"""Ranks as a list of entries (side, layer, KV head), which is how searches walk over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvpress.errors import InputError
from kvpress.matryoshka.bases import RANK_STEP, Ranks

Shapes = Sequence[tuple[int, int, int]]
#: how bad ranks are: mean KL(full || projected) on the calibration text, in nats; lower is better
Score = Callable[[Ranks], float]
#: (evaluations done, evaluations expected) -> None
Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Entries:
    """The entries of layers of these shapes. limits: dimensions of each; steps: by which each is lowered, an eighth of them."""

    shapes: tuple[tuple[int, int, int], ...]
    limits: tuple[int, ...]
    steps: tuple[int, ...]

    @classmethod
    def of(cls, shapes: Shapes, step: int | None = None) -> Entries:
        """step: None takes an eighth of each dimension, as the paper does.

        Raises:
            InputError: the step does not divide a dimension, or is no multiple of 8.
        """
        limits = tuple(shape[side] for side in (1, 2) for shape in shapes for _ in range(shape[0]))
        steps = tuple(step or limit // 8 for limit in limits)
        for limit, one in zip(limits, steps, strict=True):
            if one < 1 or limit % one or one % RANK_STEP:
                raise InputError(
                    f"a step of {one} does not divide {limit} dimensions into multiples of {RANK_STEP}: name a step that does"
                )
        return cls(tuple(shapes), limits, steps)

    def __len__(self) -> int:
        return len(self.limits)

    def ranks(self, flat: Sequence[int]) -> Ranks:
        """The flat list as ranks."""
        rest = iter(flat)

        def table() -> tuple[tuple[int, ...], ...]:
            return tuple(tuple(next(rest) for _ in range(shape[0])) for shape in self.shapes)

        return Ranks(table(), table())

    def flat(self, ranks: Ranks) -> list[int]:
        """Ranks as a flat list: the keys of all layers and heads, then the values."""
        return [rank for table in (ranks.keys, ranks.values) for layer in table for rank in layer]

    def budget(self, share: float) -> int:
        """Numbers a token that a share of the native bytes allows.

        Raises:
            InputError: even the lowest ranks need more.
        """
        allowed = int(share * sum(self.limits) + 1e-6)
        if not 0 < share <= 1 or allowed < sum(self.steps):
            raise InputError(
                f"a share of {share:g} of the bytes is below the lowest ranks, which take {sum(self.steps) / sum(self.limits):.3g}"
            )
        return allowed

    def lowered(self, flat: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """(entry, the list with this entry a step lower) for every entry that can be lowered."""
        for index, (rank, step) in enumerate(zip(flat, self.steps, strict=True)):
            if rank > step:
                yield index, [*flat[:index], rank - step, *flat[index + 1 :]]


def check_budget(entries: Entries, found: Sequence[int], budget: int) -> Ranks:
    """Ranks of a search's result, which must be within the budget."""
    assert sum(found) <= budget, "a search has overspent"
    ranks = entries.ranks(found)
    ranks.check(entries.shapes)
    return ranks
