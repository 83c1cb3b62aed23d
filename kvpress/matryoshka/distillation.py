"""The loss: the student imitates the full model and the text.

    a KL(teacher || student) + b CE,     both as means over positions, full vocabulary, temperature 1; a = 0.25, b = 0.75

(arXiv 2410.14731 by its published code and summaries.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

#: numbers of logits that are turned into probabilities at a time
CHUNK = 1 << 25


@dataclass(frozen=True)
class Distance:
    """Per position: kl [B, n - 1] in nats, KL(teacher || student); cross_entropy [B, n - 1] of the next token under the student."""

    kl: Tensor
    cross_entropy: Tensor

    def loss(self, kl_weight: float, ce_weight: float) -> Tensor:
        """The weighted sum of the means."""
        return kl_weight * self.kl.mean() + ce_weight * self.cross_entropy.mean()


def distance(teacher: Tensor, student: Tensor, ids: Tensor) -> Distance:
    """How far the student is from the teacher and from the text.

    teacher, student: logits [B, n, vocabulary]; ids: [B, n] the tokens that were read. The last position predicts nothing.
    """
    rows, n, vocabulary = student.shape
    step = max(1, CHUNK // (rows * vocabulary))
    kl, entropy = [], []
    for start, end in _chunks(n - 1, step):
        log_student = F.log_softmax(student[:, start:end].float(), -1)
        log_teacher = F.log_softmax(teacher[:, start:end].float(), -1)
        kl.append((log_teacher.exp() * (log_teacher - log_student)).sum(-1))
        entropy.append(-log_student.gather(2, ids[:, start + 1 : end + 1, None])[..., 0])
    return Distance(torch.cat(kl, 1), torch.cat(entropy, 1))


def _chunks(n: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + step, n)) for start in range(0, n, step))
