"""The score that searches minimise: mean KL(full || projected) over calibration windows, and what a step of rank is worth by its slope."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpress.errors import KvpressError
from kvpress.matryoshka.bases import Bases, Ranks
from kvpress.matryoshka.distillation import distance
from kvpress.matryoshka.entries import Entries
from kvpress.matryoshka.student import attached_student

#: bytes of the full model's logits that are kept between scores; further windows are read again each time
MAX_LOGITS = 4 << 30

NO_NUMBER = "a rank search met a divergence that is no number: check the model's dtype"


class RankScore:
    """A context in which `score(ranks)` and `score(ranks, windows)` work.

    bases: in the model's dtype and on its device. windows: [m, n] ids, whose second half is scored and whose first half is its context: an
    error of a logit does more harm among many keys, so the windows should be as long as the contexts that will be served.
    """

    def __init__(self, model: PreTrainedModel, bases: Bases, windows: Tensor) -> None:
        self.model, self.bases, self.windows = model, bases, windows.to(model.device)
        self._n_scored = windows.shape[1] - windows.shape[1] // 2
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
            raise KvpressError(NO_NUMBER)
        return found

    def worth(self, entries: Entries, flat: Sequence[int]) -> tuple[list[float], list[float]]:
        """Nats a token that every entry's last kept step saves, and that its first dropped one would save; 0 where there is none.

        Both steps of all entries are half present: a column scaled by the root of 1/2 counts for a half in U U^T. The slope by that amount
        is what a whole step is worth as far as the divergence is quadratic in the amounts.

        Raises:
            KvpressError: a slope is no number.
        """
        scales = [torch.zeros(basis.shape[0], basis.shape[-1]) for basis in (*self.bases.keys, *self.bases.values)]
        rows = (row for layer in scales for row in layer)  # one an entry, in their order
        for row, rank, step in zip(rows, flat, entries.steps, strict=True):
            row[:rank] = 1.0
            row[rank - step if rank > step else rank : rank + step] = 0.5**0.5
        slopes = [torch.zeros_like(layer) for layer in scales]
        for index in range(len(self.windows)):
            for total, one in zip(slopes, self._slopes(scales, index), strict=True):
                total += one.cpu() / len(self.windows)
        if not all(bool(torch.isfinite(layer).all()) for layer in slopes):
            raise KvpressError(NO_NUMBER)
        last, following = [], []
        rows = (row for layer in slopes for row in layer)
        for row, rank, step in zip(rows, flat, entries.steps, strict=True):
            # the amount is the square of the scale: the slope by it is the one by the scale over twice the scale
            last.append(-float(row[rank - step : rank].sum()) / 2**0.5 if rank > step else 0.0)
            following.append(-float(row[rank : rank + step].sum()) / 2**0.5)
        return last, following

    @torch.enable_grad()
    def _slopes(self, scales: Sequence[Tensor], index: int) -> Sequence[Tensor]:
        """The gradient of a window's divergence by the scale of every column: a tensor [H, d] for the keys of each layer, then the values."""
        ids = self.windows[index : index + 1]
        with torch.no_grad():
            teacher = self._teacher(index, ids)
        leaves = [layer.to(self.windows.device).requires_grad_() for layer in scales]
        scaled = [
            basis * leaf[:, None].to(basis.dtype)
            for basis, leaf in zip((*self.bases.keys, *self.bases.values), leaves, strict=True)
        ]
        n_layers = len(self.bases.keys)
        bases = replace(self.bases, keys=tuple(scaled[:n_layers]), values=tuple(scaled[n_layers:]))
        return torch.autograd.grad(self._divergence(teacher, ids, bases, Ranks.full(self.bases.shapes)), leaves)

    @torch.no_grad()
    def _one(self, ranks: Ranks, index: int) -> float:
        if (ranks, index) not in self._known:
            ids = self.windows[index : index + 1]
            self._known[(ranks, index)] = float(self._divergence(self._teacher(index, ids), ids, self.bases, ranks))
        return self._known[(ranks, index)]

    def _divergence(self, teacher: Tensor, ids: Tensor, bases: Bases, ranks: Ranks) -> Tensor:
        student = self._read(ids, bases, ranks, logits_to_keep=self._n_scored)
        return distance(teacher, student, ids[:, -self._n_scored :]).kl.mean()

    def _teacher(self, index: int, ids: Tensor) -> Tensor:
        if index in self._teachers:
            return self._teachers[index]
        logits: Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=self._n_scored).logits
        if (len(self._teachers) + 1) * logits.nbytes <= MAX_LOGITS:
            self._teachers[index] = logits
        return logits
