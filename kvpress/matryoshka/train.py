"""Training of bases: the model with projected attention imitates the unmodified one; only the bases and the means move.

    trainer = Trainer(model, start, settings, text, judge_text, folder, identity)
    trainer.run()                   # goes on from the folder's state, where there is one

Every draw depends on the seed and the step alone, so a training that was stopped and goes on does what an unbroken one does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel

from kvpress.errors import KvpressError
from kvpress.matryoshka.bases import Bases, Ranks
from kvpress.matryoshka.cayley import TrainableBases
from kvpress.matryoshka.distillation import distance
from kvpress.matryoshka.judge import judge_all
from kvpress.matryoshka.schedule import EIGHTHS, Schedule
from kvpress.matryoshka.student import attached_student
from kvpress.matryoshka.text import Text
from kvpress.matryoshka.training_state import Point, TrainingFolder


class TrainSettings(BaseModel):
    """How bases are trained.

    steps: of the optimiser; windows: of text a step, each with ranks of its own; window: tokens. learning_rate: of the matrices' free
    numbers (radians) and of the means; cosine after `warmup` steps, down to a tenth. clip: norm of all gradients. kl_weight, ce_weight:
    of the loss. shares: ranks that are drawn. judge_every: steps between two looks at the judging text, at `judge_share` of the ranks and
    over `judge_windows` windows; the state is saved then.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(default=1000, ge=0)
    windows: int = Field(default=4, ge=1)
    window: int = Field(default=2048, ge=2)
    learning_rate: float = Field(default=1e-3, gt=0)
    mean_learning_rate: float = Field(default=1e-3, gt=0)
    warmup: int = Field(default=50, ge=0)
    clip: float = Field(default=1.0, gt=0)
    kl_weight: float = Field(default=0.25, ge=0)
    ce_weight: float = Field(default=0.75, ge=0)
    shares: tuple[float, ...] = EIGHTHS
    train_means: bool = True
    seed: int = Field(default=0, ge=0, lt=2**31)
    judge_every: int = Field(default=50, ge=1)
    judge_windows: int = Field(default=4, ge=1)
    judge_share: float = Field(default=0.5, gt=0, le=1)

    def rate(self, step: int) -> float:
        """Share of the learning rate at a step (from 0)."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0)))


class TrainingStopped(KvpressError):
    """The loss or a gradient is no finite number."""


class Trainer:
    """One training. start: where the bases begin; identity: what must be the same when it goes on (model, text, settings, start).

    Raises:
        InputError: the schedule does not divide the dimensions, the text is too short, or the folder holds another training.
        TrainingStopped: the loss is no number any more; the last good state stays, see `last_good`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        start: Bases,
        settings: TrainSettings,
        text: Text,
        judge_text: Text,
        folder: Path,
        identity: dict[str, Any],
        watch: Callable[[Point], None] = lambda point: None,
    ) -> None:
        self.model, self.settings, self.text, self.watch = model, settings, text, watch
        self.judge_windows = judge_text.some(settings.judge_windows)
        self.schedule = Schedule(start.shapes, settings.shares)
        self.judge_ranks = Ranks.uniform(start.shapes, settings.judge_share)
        self.bases = TrainableBases(start, settings.train_means).to(model.device)
        matrices = [*self.bases.keys, *self.bases.values]
        groups = [{"params": matrices, "lr": settings.learning_rate}]
        if settings.train_means:
            groups.append({"params": list(self.bases.means), "lr": settings.mean_learning_rate})
        self.optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimiser, settings.rate)
        self.folder = TrainingFolder(folder, identity)
        self.step = self.folder.restore(self.bases, self.optimiser, self.scheduler)

    def run(self) -> Bases:
        """Train to the end; returns the bases, in float32 on the CPU."""
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        windows = self.text.shuffled(self.settings.seed)
        for _ in range(self.step * self.settings.windows):
            next(windows)
        try:
            for weight in weights:
                weight.requires_grad_(False)
            if self.folder.saved is None:
                self._look(0.0, math.nan)
            while self.step < self.settings.steps:
                began = time.perf_counter()
                loss = self._step([next(windows) for _ in range(self.settings.windows)])
                self.step += 1
                if self.step % self.settings.judge_every == 0 or self.step == self.settings.steps:
                    self._look(time.perf_counter() - began, loss)
                else:
                    self.folder.note(self._point(time.perf_counter() - began, loss), self.watch)
        finally:
            for weight in weights:
                weight.requires_grad_(True)
        return self.trained()

    def trained(self) -> Bases:
        """The bases as they are, in float32 on the CPU."""
        with torch.no_grad():
            bases: Bases = self.bases()
            return bases.to("cpu", torch.float32)

    def last_good(self) -> tuple[int, Bases] | None:
        """The step and the bases of the state on disk, to which the training goes back; None where nothing is saved."""
        if self.folder.saved is None:
            return None
        self.step = self.folder.restore(self.bases, self.optimiser, self.scheduler)
        return self.step, self.trained()

    def _step(self, windows: list[Tensor]) -> float:
        """One step of the optimiser; returns the mean loss."""
        settings, total = self.settings, 0.0
        with torch.enable_grad(), attached_student(self.model) as read:  # whatever the caller's mode is
            for index, window in enumerate(windows):
                ids = window[None].to(self.model.device)
                with torch.no_grad():
                    teacher = self.model(input_ids=ids, use_cache=False).logits
                ranks = self.schedule.draw(settings.seed, self.step * settings.windows + index)
                student = read(ids, self.bases(), ranks)
                loss = distance(teacher, student, ids).loss(settings.kl_weight, settings.ce_weight)
                total += float(loss.detach()) / settings.windows
                (loss / settings.windows).backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in self.bases.parameters() if p.requires_grad], settings.clip)
        if not math.isfinite(total) or not bool(torch.isfinite(norm)):
            self._stop(self.step + 1)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.scheduler.step()
        return total

    def _look(self, seconds: float, loss: float) -> None:
        """Judge the bases and save the state."""
        bases = self.trained().to(self.model.device, self.model.dtype)
        judged = judge_all(self.model, self.judge_windows, [(bases, self.judge_ranks)])[0]
        point = self._point(seconds, loss).model_copy(
            update={"judge_kl": float(judged.kl.mean()), "judge_loss": float(judged.loss.mean())}
        )
        if not math.isfinite(float(judged.kl.mean())):  # such a state is not worth keeping
            self._stop(self.step)
        self.folder.note(point, self.watch)
        self.folder.save(self.step, self.bases, self.optimiser)

    def _stop(self, step: int) -> NoReturn:
        saved = self.folder.saved
        left = "nothing is saved" if saved is None else f"the state of step {saved} in '{self.folder.path}' is good"
        raise TrainingStopped(
            f"training stopped at step {step}: the loss is no finite number; {left}: start again in another folder with a smaller learning "
            f"rate, or in float32"
        )

    def _point(self, seconds: float, loss: float) -> Point:
        return Point(step=self.step, loss=None if math.isnan(loss) else loss, seconds=seconds)
