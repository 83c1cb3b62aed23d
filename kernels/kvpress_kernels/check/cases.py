"""What a case is, how its results are judged, and what is allowed.

A relative error is ||kernel - reference|| / ||reference||, the reference in float64 on the same stored numbers. A
kernel runs twice, in buffers filled with NaN, and both runs must agree in every bit. Where torch's own attention
applies to the same inputs, a kernel may have twice its error at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvpress_kernels.launch import INTERPRETED

#: relative errors that are allowed for numbers kept in float32, by the dtype of the inputs
RELATIVE = {torch.bfloat16: 2e-3, torch.float16: 4e-4, torch.float32: 2e-6}
#: absolute errors that are allowed for log-sum-exps
LOG_SUM = {torch.bfloat16: 2e-3, torch.float16: 2e-3, torch.float32: 1e-5}
#: largest logits of the cases with large ones, and what float32 then loses: a few of its rounding errors, times the logit
LARGE_LOGIT = 80.0
LARGE_LOGIT_ERROR = 8 * LARGE_LOGIT * 2**-24

Results = Mapping[str, Tensor]


class SkippedError(Exception):
    """A case that cannot run on this device; the message says why."""


@dataclass(frozen=True)
class Trial:
    """A case with its inputs made.

    run: launches the kernel on fresh state and returns what is defined of its results, by name. expected: the same
    from the reference. allowed: error of each result; 0 means equal in every bit, and the reference then works in the
    results' own dtype. absolute: names of those whose largest absolute error counts.
    peers: relative errors of torch's own attention, of which a kernel may have twice as much.
    """

    run: Callable[[], Results]
    expected: Callable[[], Results]
    allowed: Mapping[str, float]
    absolute: frozenset[str] = frozenset()
    peers: Callable[[Results], Mapping[str, float]] = field(default=lambda expected: {})


@dataclass(frozen=True)
class Case:
    """One configuration of an op; `make` builds its inputs on a device and may raise SkippedError."""

    op: str
    label: str
    make: Callable[[torch.device], Trial]


class Finding(NamedTuple):
    """One judged number. error and allowed are None for a case that was skipped or raised; note says which."""

    op: str
    case: str
    quantity: str
    error: float | None
    allowed: float | None
    ok: bool
    note: str = ""


def judge(case: Case, device: torch.device) -> list[Finding]:
    """Run a case; a case that raises is a finding that is not ok."""
    try:
        return list(_judged(case, case.make(device)))
    except SkippedError as reason:
        return [Finding(case.op, case.label, "", None, None, True, f"skipped: {reason}")]
    except Exception as error:  # one broken kernel must not hide the others
        return [Finding(case.op, case.label, "", None, None, False, f"{type(error).__name__}: {error}")]


def _judged(case: Case, trial: Trial) -> Iterator[Finding]:
    with PoisonedBuffers():
        first = {name: value.clone() for name, value in trial.run().items()}
        second = trial.run()
    expected = trial.expected()
    if not first.keys() == second.keys() == expected.keys() == trial.allowed.keys():
        raise ValueError(f"results {sorted(first)}, expected {sorted(expected)}, allowed {sorted(trial.allowed)}")
    peers = trial.peers(expected)
    for name, allowed in trial.allowed.items():
        error = difference(first[name], expected[name], name in trial.absolute)
        yield Finding(case.op, case.label, name, error, allowed, error <= allowed)
        if name in peers:
            # a sum of float32 rounds at least this much, in whatever order it is made
            twice = max(2 * peers[name], 8 * torch.finfo(torch.float32).eps)
            yield Finding(case.op, case.label, f"{name}, of torch's", error, twice, error <= twice)
    differ = sum(not same_bits(first[name], second[name]) for name in first)
    yield Finding(case.op, case.label, "results that differ in a second run", float(differ), 0.0, differ == 0)


def difference(value: Tensor, expected: Tensor, absolute: bool = False) -> float:
    """Relative error, or the largest absolute one; infinite for another shape or a NaN. Equal infinities are equal."""
    if value.shape != expected.shape:
        return math.inf
    value, expected = value.double(), expected.double()
    equal = value == expected
    apart = torch.where(equal, 0.0, value - expected)
    if absolute:
        error = apart.abs().max() if apart.numel() else apart.new_zeros(())
    else:
        size = torch.where(equal & expected.isinf(), 0.0, expected).norm()
        error = torch.where(apart.norm() == 0, 0.0, apart.norm() / size)
    return math.inf if error.isnan() else float(error)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors agree in every bit."""
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


class PoisonedBuffers(TorchDispatchMode):
    """Inside, `torch.empty` and its kin are filled with NaN (integers: their largest value)."""

    _empties = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self._empties:
            floating = result.is_floating_point()
            result.fill_(
                math.nan if floating else True if result.dtype == torch.bool else torch.iinfo(result.dtype).max
            )
        return result


def stored_half(dtype: torch.dtype) -> float:
    """Relative error allowed for results stored in `dtype`; the interpreter cuts bfloat16 off instead of rounding."""
    return 3 * RELATIVE[dtype] if INTERPRETED and dtype == torch.bfloat16 else RELATIVE[dtype]
