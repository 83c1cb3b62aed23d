"""The score that searches minimise: mean KL(full || projected) over calibration windows."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpress.errors import KvpressError
from kvpress.matryoshka.bases import Bases, Ranks
from kvpress.matryoshka.distillation import distance
from kvpress.matryoshka.student import attached_student

#: bytes of the full model's logits that are kept between scores; further windows are read again each time
MAX_LOGITS = 4 << 30


class RankScore:
    """A context in which `score(ranks)` and `score(ranks, windows)` work. bases: in the model's dtype and on its device."""

    def __init__(self, model: PreTrainedModel, bases: Bases, windows: Tensor) -> None:
        self.model, self.bases, self.windows = model, bases, windows.to(model.device)
        self._student = attached_student(model)
        self._teachers: dict[int, Tensor] = {}
        self._known: dict[tuple[Ranks, int], float] = {}
        self._read: Any = None

    def __enter__(self) -> RankScore:
        self._read = self._student.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._student.__exit__(kind, error, at)

    def __call__(self, ranks: Ranks, windows: int | None = None) -> float:
        """Nats a token over the first `windows` windows, None for all.

        Raises:
            KvpressError: the divergence is no number.
        """
        n = len(self.windows) if windows is None else min(windows, len(self.windows))
        found = sum(self._one(ranks, index) for index in range(n)) / n
        if not found < float("inf"):
            raise KvpressError("a rank search met a divergence that is no number: check the model's dtype")
        return found

    @torch.no_grad()
    def _one(self, ranks: Ranks, index: int) -> float:
        if (ranks, index) not in self._known:
            ids = self.windows[index : index + 1]
            measured = distance(self._teacher(index, ids), self._read(ids, self.bases, ranks), ids)
            self._known[(ranks, index)] = float(measured.kl.mean())
        return self._known[(ranks, index)]

    def _teacher(self, index: int, ids: Tensor) -> Tensor:
        if index in self._teachers:
            return self._teachers[index]
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        if (len(self._teachers) + 1) * logits.nbytes <= MAX_LOGITS:
            self._teachers[index] = logits
        return logits
