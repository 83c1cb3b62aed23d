"""What a task is, and the registry of them. A task is one object that yields samples; adding one is adding a file.

class Mine(Task):
    name, family = "mine/first", "mine"

    def samples(self, request: Request) -> Iterator[Sample]:
        for index in request.indices(500):
            yield Sample(id=str(index), ...)

register(Mine())
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kvpress.errors import InputError, unknown
from kvpress_eval.data import Data
from kvpress_eval.sample import Sample


@dataclass(frozen=True)
class Request:
    """What a run asks of a task.

    tokenizer: the evaluated model's. length: tokens of prompt and answer together, in that tokenizer, for tasks that
    are generated to a length; None for sets with lengths of their own. limit: at most so many samples, None for all.
    seed: of everything that is drawn. data: where files are. chat: None uses the chat template where the tokenizer has
    one and the sample allows it; False never does.
    """

    tokenizer: PreTrainedTokenizerBase
    data: Data
    length: int | None = None
    limit: int | None = None
    seed: int = 42
    chat: bool | None = None

    def indices(self, available: int) -> range:
        """Indices of the samples to yield, out of `available` ones."""
        return range(available if self.limit is None else min(self.limit, available))


class Task(ABC):
    """Base of all tasks.

    official: samples of the published set, None where it has no fixed number.
    name: unique, "family/task". family: the rows that a report puts together, and that it averages to one macro score.
    in_macro: False for tasks at the floor or ceiling, which a report shows apart. needs_length: whether
    `Request.length` must be given. description: one line for `kvpress eval list`. caveat: printed with every score.
    """

    name: str
    family: str
    description: str = ""
    caveat: str = ""
    in_macro: bool = True
    official: int | None = None
    needs_length: bool = False

    @abstractmethod
    def samples(self, request: Request) -> Iterator[Sample]:
        """The samples, in the task's own order; the first n of a larger limit are those of limit n.

        Raises:
            InputError: data is missing or wrong (the sentence names the command that gets it), or the length is too
                small for the task.
        """


TASKS: dict[str, Task] = {}


def register(task: Task) -> None:
    """Make a task known under its name."""
    if task.name in TASKS:
        raise ValueError(f"task '{task.name}' is registered twice")
    TASKS[task.name] = task


def find_tasks(name: str) -> list[Task]:
    """The task of a name, or all tasks of a family, in the order in which they were registered.

    Raises:
        InputError: the name is neither.
    """
    if name in TASKS:
        return [TASKS[name]]
    family = [task for task in TASKS.values() if task.family == name]
    if not family:
        raise InputError(unknown("task", name, {*TASKS, *(task.family for task in TASKS.values())}))
    return family
