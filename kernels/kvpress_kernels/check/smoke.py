"""One small launch of every op, to see that kernels compile, run and agree with their references on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from kvpress_kernels.check.cases import judge
from kvpress_kernels.check.inputs import Size
from kvpress_kernels.check.suite import cases
from kvpress_kernels.ops import OPS

_SIZE = Size("small", (64,), (32,), (4,), 2, (torch.bfloat16,), 1)


def _launch(op: str, device: torch.device) -> None:
    """Raise RuntimeError where the first case of an op does not pass."""
    wrong = [finding for finding in judge(next(cases(op, _SIZE)), device) if not finding.ok]
    if wrong:
        first = wrong[0]
        raise RuntimeError(first.note or f"{first.quantity} off by {first.error:.1e}, {first.allowed:.1e} allowed")


#: op -> a function of a device that raises RuntimeError where something is wrong
SMOKE: Mapping[str, Callable[[torch.device], None]] = {op: partial(_launch, op) for op in OPS}
