"""How far bases and ranks are from the full model on text that neither training nor search has seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpress.matryoshka.bases import Bases, Ranks
from kvpress.matryoshka.distillation import distance
from kvpress.matryoshka.student import attached_student


@dataclass(frozen=True)
class Judged:
    """Per window: kl [m], mean KL(full || projected) in nats; loss [m], mean cross-entropy of the text in nats a token."""

    kl: Tensor
    loss: Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return float(self.loss.mean().exp())


def judge(
    model: PreTrainedModel, windows: Tensor, settings: Sequence[tuple[Bases, Ranks]], rows: int = 1
) -> Iterator[list[Judged]]:
    """For every `rows` windows the measures of all settings; the full model reads each window once.

    windows: [m, n] ids. The bases must be in the model's dtype and on its device.
    """
    for ids in windows.split(rows):  # nothing stays switched off or attached between two windows
        yield _judge(model, ids.to(model.device), settings)


@torch.no_grad()
def _judge(model: PreTrainedModel, ids: Tensor, settings: Sequence[tuple[Bases, Ranks]]) -> list[Judged]:
    found = []
    with attached_student(model) as read:
        teacher = model(input_ids=ids, use_cache=False).logits
        for bases, ranks in settings:
            measured = distance(teacher, read(ids, bases, ranks), ids)
            found.append(Judged(measured.kl.mean(1).cpu(), measured.cross_entropy.mean(1).cpu()))
    return found


def judge_all(
    model: PreTrainedModel, windows: Tensor, settings: Sequence[tuple[Bases, Ranks]], rows: int = 1
) -> list[Judged]:
    """`judge` over all windows."""
    parts = list(judge(model, windows, settings, rows))
    return [
        Judged(torch.cat([part[i].kl for part in parts]), torch.cat([part[i].loss for part in parts]))
        for i in range(len(settings))
    ]
