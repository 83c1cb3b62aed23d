"""Where the tasks of a run tell how far they are. A Ray actor; it imports nothing, so that its process starts at once."""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """The process that works on a shard."""

    host: str
    pid: int


#: ((task, mode, shard), (done, total))
Count = tuple[tuple[str, str, int], tuple[int, int]]


class Board:
    """The news since the driver last looked."""

    def __init__(self) -> None:
        self._places: dict[int, Place] = {}
        self._counts: dict[tuple[str, str, int], tuple[int, int]] = {}

    def begin(self, shard: int, place: Place) -> None:
        """A shard has loaded its model in this process."""
        self._places[shard] = place

    def note(self, shard: int, task: str, mode: str, done: int, total: int) -> None:
        """A shard has done so many of its items in a task."""
        self._counts[task, mode, shard] = done, total

    def take(self) -> tuple[dict[int, Place], list[Count]]:
        """What is new, once."""
        news = self._places, list(self._counts.items())
        self._places, self._counts = {}, {}
        return news
