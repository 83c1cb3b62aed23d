"""Small things that all NeedleBench tasks share: the order of a grid's cells, and filling a frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def diagonal(first: Sequence[A], second: Sequence[B]) -> list[tuple[A, B]]:
    """All pairs, in an order whose beginnings are balanced: each run of len(first) pairs has every element of `first`
    once and those of `second` as evenly as it can be."""
    return [
        (item, second[(column + shift) % len(second)])
        for shift in range(len(second))
        for column, item in enumerate(first)
    ]


def fill(frame: str, **values: object) -> str:
    r"""A frame with `{name}` replaced, and other braces, such as those of `\boxed{}`, left as they are."""
    for name, value in values.items():
        frame = frame.replace(f"{{{name}}}", str(value))
    return frame


def halves(frame: str) -> tuple[str, str]:
    """What stands before and behind `{context}`."""
    before, after = frame.split("{context}")
    return before, after
