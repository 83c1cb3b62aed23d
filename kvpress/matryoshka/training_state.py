"""The folder of a training: what it is, its state, and its curve.

training.json           what the training is; another one is refused
state.safetensors       free numbers, means and the optimiser's moments of the last good step; replaced at once
curve.jsonl             one line a step
projection.safetensors  the result (checkpoint.py)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvpress.errors import InputError
from kvpress.files import write_atomically
from kvpress.matryoshka.cayley import TrainableBases

STEP = "step"


class Point(BaseModel):
    """One step of a curve. loss: of the step's text; seconds: of the step; judge_kl, judge_loss: on the judging text, nats a token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    loss: float | None
    seconds: float
    judge_kl: float | None = None
    judge_loss: float | None = None


class TrainingFolder:
    """`saved`: the step of the state on disk, None before there is one."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.saved: int | None = None
        known = path / "training.json"
        text = json.dumps(identity, indent=1, sort_keys=True)
        if not known.exists():
            if (path / "state.safetensors").exists():
                raise InputError(f"'{path}' holds a state but no training.json: use another folder")
            write_atomically(known, text + "\n")
            return
        try:
            before = json.loads(known.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise InputError(f"'{known}' cannot be read: use another folder") from None
        if before != json.loads(text):
            odd = sorted(key for key in {*before, *identity} if before.get(key) != json.loads(text).get(key))
            raise InputError(f"'{path}' holds another training (it differs in {', '.join(odd)}): use another folder")

    @property
    def curve(self) -> Path:
        return self.path / "curve.jsonl"

    @property
    def projection(self) -> Path:
        return self.path / "projection.safetensors"

    def restore(self, bases: TrainableBases, optimiser: torch.optim.Optimizer, scheduler: Any) -> int:
        """Bring everything to the state on disk, and the curve back to its step; returns the step, 0 where there is none."""
        path = self.path / "state.safetensors"
        if not path.exists():
            self.curve.unlink(missing_ok=True)
            return 0
        try:
            with safe_open(str(path), framework="pt") as file:
                step = int(file.metadata()[STEP])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            with torch.no_grad():
                for (
                    name,
                    start,
                ) in bases.named_buffers():  # free numbers are relative to the start that they were trained from
                    start.copy_(tensors[name])
                for name, parameter in bases.named_parameters():
                    parameter.copy_(tensors[name])
                    if parameter.requires_grad:
                        optimiser.state[parameter] = {
                            "step": torch.tensor(float(step)),
                            "exp_avg": tensors[f"{name}/first"].to(parameter),
                            "exp_avg_sq": tensors[f"{name}/second"].to(parameter),
                        }
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise InputError(f"'{path}' is damaged ({str(error).splitlines()[0]}): delete it to begin again") from None
        scheduler.last_epoch = step
        for group, base, rate in zip(optimiser.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * rate(step)
        self.saved = step
        lines = [line for line in points(self.curve) if line.step <= step]
        write_atomically(self.curve, "".join(line.model_dump_json() + "\n" for line in lines))
        return step

    def save(self, step: int, bases: TrainableBases, optimiser: torch.optim.Optimizer) -> None:
        """Replace the state."""
        tensors: dict[str, Tensor] = {name: start.cpu().contiguous() for name, start in bases.named_buffers()}
        for name, parameter in bases.named_parameters():
            tensors[name] = parameter.detach().cpu().contiguous()
            if parameter.requires_grad:
                moments = optimiser.state.get(parameter, {})
                for name_here, key in ((f"{name}/first", "exp_avg"), (f"{name}/second", "exp_avg_sq")):
                    moment = moments.get(key)
                    tensors[name_here] = (
                        torch.zeros_like(parameter).cpu() if moment is None else moment.cpu().contiguous()
                    )
        write_atomically(self.path / "state.safetensors", save(tensors, {STEP: str(step)}))
        self.saved = step

    def note(self, point: Point, watch: Callable[[Point], None]) -> None:
        """Add a step to the curve, and tell who watches."""
        with self.curve.open("a", encoding="utf-8") as file:
            file.write(point.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
        watch(point)


def points(curve: Path) -> list[Point]:
    """The steps of a curve; a last line that was cut short is left out."""
    found: list[Point] = []
    if curve.exists():
        for line in curve.read_text(encoding="utf-8").splitlines():
            try:
                found.append(Point.model_validate_json(line))
            except ValueError:
                break
    return found
