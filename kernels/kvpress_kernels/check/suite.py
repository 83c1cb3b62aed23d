"""All cases of an op, and the device they run on."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import torch

from kvpress_kernels.check.cases import Case, Finding, judge
from kvpress_kernels.check.inputs import Size
from kvpress_kernels.launch import INTERPRETED


def cases(op: str, size: Size) -> Iterator[Case]:
    """The cases of an op."""
    found: Iterator[Case] = import_module(f"kvpress_kernels.check.{op}").cases(size)
    return found


def check(op: str, size: Size, device: torch.device) -> list[Finding]:
    """Findings of all cases of an op."""
    return [finding for case in cases(op, size) for finding in judge(case, device)]


def device_name() -> str | None:
    """Name of the device that kernels run on here; None where there is none."""
    if INTERPRETED:
        return "interpreter"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
