"""`python -m kvpress_kernels.check`: run all cases, print a table and a line of JSON."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from itertools import groupby

import torch
import triton

from kvpress_kernels import ops
from kvpress_kernels.check.cases import Finding
from kvpress_kernels.check.inputs import FULL, SMALL
from kvpress_kernels.check.suite import check, device_name
from kvpress_kernels.launch import INTERPRETED


def table(findings: Sequence[Finding]) -> str:
    """One line a case, with the result that is nearest to what is allowed, and one for everything that is not ok."""
    header = ("op", "case", "nearest to its bound", "error", "allowed", "ok")
    lines = [header]
    for _, of_case in groupby(findings, key=lambda finding: (finding.op, finding.case)):
        judged = list(of_case)
        shown = [f for f in judged if not f.ok] or [max(judged, key=_used_up)]
        lines += [(f.op, f.case, f.note or f.quantity, _number(f.error), _number(f.allowed), _word(f)) for f in shown]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _used_up(finding: Finding) -> float:
    """Share of the allowed error that is used."""
    return finding.error / finding.allowed if finding.error and finding.allowed else 0.0


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value else "0"


def _word(finding: Finding) -> str:
    return "FAILED" if not finding.ok else "-" if finding.error is None else "ok"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvpress_kernels.check")
    parser.add_argument("--op", nargs="+", default=list(ops.OPS), choices=ops.OPS, metavar="NAME", help="ops to check")
    parser.add_argument("--json", metavar="FILE", help="also write the findings to a file")
    options = parser.parse_args(arguments)
    name = device_name()
    if name is None:
        print("No CUDA or ROCm device here: the kernels can be compiled (kvpress_kernels.compile_report), not run.")
        return 2
    device = torch.device("cpu" if INTERPRETED else "cuda")
    started, findings = time.monotonic(), list[Finding]()
    for op in options.op:
        findings += check(op, SMALL if INTERPRETED else FULL, device)
        print(f"{op} done, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    failed = sum(not finding.ok for finding in findings)
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}")
    print(table(findings))
    line = json.dumps({
        "device": name, "torch": torch.__version__, "triton": triton.__version__, "failed": failed,
        "findings": [_plain(finding) for finding in findings],
    })  # fmt: skip
    print(line)
    if options.json:
        with open(options.json, "w") as file:
            file.write(line + "\n")
    return 1 if failed else 0


def _plain(finding: Finding) -> dict[str, object]:
    """JSON has no infinity."""
    fields = finding._asdict()
    return fields | {"error": "infinite" if finding.error == math.inf else finding.error}


if __name__ == "__main__":
    sys.exit(main())
