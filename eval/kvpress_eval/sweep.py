"""A sweep: which model answers which tasks under which contracts. A YAML file; docs/evaluation.md explains the fields."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kvpress.errors import InputError
from kvpress.files import read_yaml
from kvpress_eval.arms import Arm, make_arms
from kvpress_eval.records import Mode
from kvpress_eval.tasks import find_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvpress_eval.engine import Engine
    from kvpress_eval.units import Item


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TaskChoice(_Fields):
    """A task or a whole family. length: tokens, for tasks generated to a length. limit: overrides the sweep's. metric:
    replaces the benchmark's own, by name, such as code_sim-indel; every record states the metric that it was scored with."""

    task: str
    metric: str | None = None
    length: int | None = Field(default=None, ge=64)
    limit: int | None = Field(default=None, ge=1)


class Margins(_Fields):
    """What counts as no loss, fixed before the run: points of the score as shares, 0.03 is three points of 100."""

    task: float = Field(default=0.03, gt=0, lt=1)
    macro: float = Field(default=0.01, gt=0, lt=1)


class Sweep(_Fields):
    """What is run.

    model: hub id, folder or .gguf file. contracts: presets, paths or mappings; budgets: short forms, empty for each
        contract's own. modes: whether the question is there when the cache is cut. limit: samples per task. seed: of all
        that is drawn. max_length: prompts of sets with lengths of their own are truncated to it, None to the model's
        context. chat: None uses the chat template where there is one. prefill_chunk: tokens of a forward pass over the
        prompt, None reads it whole. noise_floor: samples per task that the full cache answers once more, through other
        kernels. batch_arms: decode all arms of a sample in one batch; false decodes each alone, for honest speeds.
    """

    command: ClassVar[str] = "eval"
    name: str = Field(default="sweep", pattern=r"^[\w.-]+$")
    model: str
    tasks: Annotated[tuple[TaskChoice, ...], Field(min_length=1)]
    contracts: tuple[str | dict[str, Any], ...] = ()
    budgets: tuple[str | float | int, ...] = ()
    modes: Annotated[tuple[Mode, ...], Field(min_length=1)] = ("query_aware",)
    limit: int | None = Field(default=None, ge=1)
    seed: int = Field(default=42, ge=0, lt=2**63)
    max_length: int | None = Field(default=None, ge=64)
    chat: bool | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    backend: Literal["auto", "torch", "triton"] = "auto"
    prefill_chunk: int | None = Field(default=None, ge=16)
    noise_floor: int = Field(default=0, ge=0)
    batch_arms: bool = True
    margins: Margins = Margins()
    data: tuple[str, ...] = ()

    @field_validator("modes")
    @classmethod
    def _each_once(cls, modes: tuple[Mode, ...]) -> tuple[Mode, ...]:
        if len(set(modes)) < len(modes):
            raise ValueError("a mode is given twice")
        return modes

    def arms(self) -> list[Arm]:
        """The arms that answer every sample.

        Raises:
            ContractError: a contract does not exist or does not fit a budget. InputError: two arms have one name.
        """
        return make_arms(self.contracts, self.budgets)

    def notes(self, task: str, items: Sequence[Item]) -> dict[str, dict[str, Any]]:
        """What a manifest should hold of a task's samples beside their number: part of the manifest -> entries."""
        return {}

    def engine(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arms: Sequence[Arm]) -> Engine:
        """What answers prompts under these arms."""
        from kvpress_eval.engine import Engine

        return Engine(model, tokenizer, arms, backend=self.backend, chunk=self.prefill_chunk, batch=self.batch_arms)


def sweeps_folder() -> Path:
    """The folder of the sweeps that come with the package: inside it, or at the root of a checkout."""
    import kvpress

    package = Path(kvpress.__file__).resolve().parent
    inside = package / "configs" / "sweeps"
    return inside if inside.is_dir() else package.parent / "configs" / "sweeps"


def load_sweep(source: str | Path, *, length: int | None = None, limit: int | None = None, **changes: Any) -> Sweep:
    """A sweep from a YAML file or the name of one that comes with the package.

    length: of every task that is generated to one. limit: samples of every task, whatever the file says.
    changes: replace fields; None changes nothing. Relative folders in `data` begin at the working directory.

    Raises:
        InputError: the file is missing, too large, no YAML, or a field is wrong.
    """
    path = Path(source)
    if not path.suffix and not path.exists():
        known = sorted(p.stem for p in sweeps_folder().glob("*.yaml"))
        path = sweeps_folder() / f"{source}.yaml"
        if not path.is_file():
            raise InputError(f"there is no sweep '{source}': give a .yaml file, or one of {', '.join(known)}")
    fields = read_yaml(path, "sweep file")
    if not isinstance(fields, dict):
        raise InputError(f"sweep file '{path}' holds no mapping of fields")
    name = re.sub(r"[^\w.-]+", "-", path.stem)
    fields = {"name": name, **fields, **{key: value for key, value in changes.items() if value is not None}}
    sweep = parse_sweep(fields, f"sweep '{path}'")
    data = tuple(str(Path(place).expanduser().resolve()) for place in sweep.data)
    tasks = tuple(_changed(task, length, limit) for task in sweep.tasks)
    return sweep.model_copy(update={"data": data, "tasks": tasks, "limit": limit or sweep.limit})


def _changed(task: TaskChoice, length: int | None, limit: int | None) -> TaskChoice:
    if length is not None and any(found.needs_length for found in find_tasks(task.task)):
        task = task.model_copy(update={"length": length})
    return task if limit is None else task.model_copy(update={"limit": None})


def parse_sweep(fields: dict[str, Any], where: str) -> Sweep:
    """A sweep from a mapping; `where` begins the sentence about a wrong field.

    Raises:
        InputError: a field is missing, unknown or wrong.
    """
    odd = next((key for key in fields if not isinstance(key, str)), None)
    if odd is not None:
        raise InputError(f"{where}: field {odd!r} is no name (YAML reads on, off, yes and no as booleans)")
    kind: type[Sweep] = Sweep
    if "host" in fields:  # a diagnostic compares everything with a host
        from kvpress_eval.diagnostic.study import Study

        kind = Study
    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name, said = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
        raise InputError(f"{where}: " + (f"field '{name}': " if name else "") + said[0].lower() + said[1:]) from None
