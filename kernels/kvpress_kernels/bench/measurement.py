"""What is measured, and how a row of the results is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvpress_kernels.bench.timing import Launch, Timer
from kvpress_kernels.check.cases import Finding

#: inputs of launches that read almost nothing
MAX_SETS = 128


@dataclass(frozen=True)
class Prepared:
    """One set of inputs. launch: what is timed. baselines: other kernels on the same numbers, by name, or why not.

    agree: the relative difference between the results of the kernel and of a baseline, and what is allowed.
    """

    launch: Launch
    baselines: Mapping[str, Launch | str] = field(default_factory=dict)
    agree: Callable[[], tuple[float, float]] | None = None


@dataclass(frozen=True)
class Measurement:
    """One configuration of an op.

    prepare: device, seed -> inputs of their own. nbytes: read and written by a launch, from the shapes; floating: its
    floating point operations, where they and not bytes are the bound. at_most: how often a launch may run on the same
    inputs. sets: inputs to rotate through, by default as many as make the rotation, MAX_SETS at most.
    repeated: launches that a user waits for, for the row's note (32 layers).
    """

    op: str
    setting: Mapping[str, Any]
    prepare: Callable[[torch.device, int], Prepared]
    nbytes: int
    floating: int = 0
    at_most: int | None = None
    sets: int | None = None
    repeated: int = 1


Row = dict[str, Any]


def gate(findings: Sequence[Finding]) -> str:
    """ "ok", or what is wrong."""
    wrong = [f"{f.case}: {f.note or f.quantity}" for f in findings if not f.ok]
    return f"{len(wrong)} of {len(findings)} checks failed, {wrong[0]}" if wrong else "ok"


def measure(
    work: Measurement, device: torch.device, timer: Timer, copy: float, checked: str, rotation: int = 100 << 20
) -> Row:
    """A row of the results; without a time where the results are wrong or the launch fails."""
    row: Row = {
        "op": work.op, **work.setting, "bytes": work.nbytes, "microseconds": None, "tb_per_s": None, "of_copy": None,
        "baselines": {}, "gate": checked,
    }  # fmt: skip
    if checked != "ok":
        return row
    try:
        _time(work, device, timer, copy, row, rotation)
    except Exception as error:  # out of memory, a launch that cannot be captured
        row["gate"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return row


def _time(work: Measurement, device: torch.device, timer: Timer, copy: float, row: Row, rotation: int) -> None:
    n_sets = work.sets or max(1, min(MAX_SETS, -(-rotation // work.nbytes)))
    sets = [work.prepare(device, seed) for seed in range(n_sets)]
    if sets[0].agree is not None:
        difference, allowed = sets[0].agree()
        if not difference <= allowed:
            row["gate"] = f"differs by {difference:.1e} from a baseline, {allowed:.1e} allowed"
            return
    seconds = timer([one.launch for one in sets], work.at_most)
    row["microseconds"] = seconds * 1e6
    row["tb_per_s"] = work.nbytes / seconds / 1e12
    row["of_copy"] = work.nbytes / seconds / copy
    if work.floating:
        row["tflop_per_s"] = work.floating / seconds / 1e12
    if work.repeated > 1:
        row[f"milliseconds_of_{work.repeated}"] = seconds * 1e3 * work.repeated
    for name, first in sets[0].baselines.items():
        if isinstance(first, str):
            row["baselines"][name] = first
            continue
        try:
            launches = [launch for one in sets if not isinstance(launch := one.baselines[name], str)]
            row["baselines"][name] = timer(launches) * 1e6
        except Exception as error:  # a baseline that fails says so, and costs nothing else
            row["baselines"][name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def table(rows: Sequence[Row]) -> str:
    """One line a row."""
    header = ("op", "setting", "us", "TB/s", "of copy", "baselines in us")
    lines = [header, *(_line(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


_RESULTS = ("op", "bytes", "microseconds", "tb_per_s", "of_copy", "baselines", "gate")


def _line(row: Row) -> tuple[str, ...]:
    setting = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if name not in _RESULTS
    )
    if row["microseconds"] is None:
        return row["op"], setting, "-", "-", "-", row["gate"]
    others = ", ".join(
        f"{name} {value:.1f}" if isinstance(value, float) else f"{name}: {value}"
        for name, value in row["baselines"].items()
    )
    return row["op"], setting, f"{row['microseconds']:.1f}", f"{row['tb_per_s']:.2f}", f"{row['of_copy']:.0%}", others
