"""How far a run is: a bar with the time that is left, or lines of JSON for the process that started this one."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvpress_eval.records import Mode
from kvpress_eval.sweep import Sweep


class Count:
    """Items done and items in all, over the tasks and shards of a run; tasks not begun are guessed from the others."""

    def __init__(self, sweep: Sweep) -> None:
        from kvpress_eval.runner import tasks_of

        self.n_tasks = len(sweep.modes) * sum(len(tasks_of(choice)) for choice in sweep.tasks)
        self.seen: dict[tuple[str, Mode, int], tuple[int, int]] = {}

    def note(self, task: str, mode: Mode, done: int, total: int, shard: int = 0) -> None:
        """A shard has done so many of its items in a task."""
        self.seen[(task, mode, shard)] = (done, total)

    @property
    def done(self) -> int:
        return sum(done for done, _ in self.seen.values())

    @property
    def total(self) -> float:
        """Of all tasks; those that no shard has begun count as the mean of the others."""
        known = sum(total for _, total in self.seen.values())
        begun = len({(task, mode) for task, mode, _ in self.seen})
        return known * self.n_tasks / begun if begun else 0.0


class Bar:
    """A progress bar on a console; call it as the runner's Progress."""

    def __init__(self, sweep: Sweep, console: Console) -> None:
        self.count = Count(sweep)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            speed_estimate_period=600,  # samples take seconds to minutes
        )
        self._line = self._bar.add_task("loading", total=None)

    def __call__(self, task: str, mode: Mode, done: int, total: int, shard: int = 0) -> None:
        self.count.note(task, mode, done, total, shard)
        self._bar.update(
            self._line, description=f"{task} {mode}", completed=self.count.done, total=round(self.count.total)
        )

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()


class JsonLines:
    """One JSON object a call on stdout."""

    def __call__(self, task: str, mode: Mode, done: int, total: int) -> None:
        print(json.dumps({"task": task, "mode": mode, "done": done, "total": total}), flush=True)

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def read_line(line: str) -> dict[str, Any] | None:
    """A line of JsonLines, None for any other line."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"task", "mode", "done", "total"} <= found.keys() else None
