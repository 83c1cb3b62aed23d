"""Compile every shipped configuration of every kernel for every architecture, and report what came out.

    python -m kvpress_kernels.compile_report                      a table; exit code 1 if a row has a problem
    python -m kvpress_kernels.compile_report --json               the same rows as JSON
    python -m kvpress_kernels.compile_report --markdown --arch sm_90     the table of docs/kernels.md
    python -m kvpress_kernels.compile_report --arch sm_90 --op ragged_decode
    python -m kvpress_kernels.compile_report --arch sm_80 gfx942 --main

Needs no device. What is judged, and how, is in compiled.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace

import triton

from kvpress_kernels import ops
from kvpress_kernels.compiled import DEVICES, Row, measure, use_cache
from kvpress_kernels.launch import CompileCase

COLUMNS = ("kernel", "config", "arch", "registers", "spills", "shared_bytes", "ctas_per_sm", "kv_buffers", "load_bytes")
#: seconds between two lines of progress
PROGRESS_EVERY = 5.0


def cases(names: Iterable[str], architectures: Iterable[str]) -> list[tuple[CompileCase, str]]:
    """Shipped configurations of the named ops on the named architectures."""
    architectures = list(architectures)
    found = []
    for name in names:
        if name in ops.WITHOUT_KERNEL:
            continue
        for arch in architectures:
            for case in ops.load(name).compile_cases(arch):
                label = case.config if case.op == name else f"{case.op} {case.config}"
                found.append((replace(case, op=name, config=label), arch))
    return found


def report(work: Sequence[tuple[CompileCase, str]], workers: int | None = None) -> list[Row]:
    """Rows in the order of the work, compiled in `workers` processes (the cores that this process may use)."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(work))
    if workers <= 1:
        return [measure(*item) for item in work]
    # Jitted functions cannot be pickled: children inherit the list and are told an index.
    _inherited[:] = work
    rows: dict[int, Row] = {}
    started = said = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        waiting = {pool.submit(_measure, index): index for index in range(len(work))}
        for future in as_completed(waiting):
            rows[waiting[future]] = future.result()
            if time.monotonic() - said > PROGRESS_EVERY:
                said = time.monotonic()
                print(f"{len(rows)} of {len(work)} compiled, {said - started:.0f} s", file=sys.stderr, flush=True)
    return [rows[index] for index in range(len(work))]


_inherited: list[tuple[CompileCase, str]] = []


def _measure(index: int) -> Row:
    return measure(*_inherited[index])


def table(rows: Sequence[Row]) -> str:
    """Fixed-width text, problems under the row that has them."""
    cells = [COLUMNS, *([_cell(row[name]) for name in COLUMNS] for row in rows)]  # type: ignore[literal-required]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    lines = []
    for index, line in enumerate(cells):
        text = [
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(text).rstrip())
        lines += [f"    ! {sentence}" for sentence in (rows[index - 1]["problems"] if index else [])]
    return "\n".join(lines)


def is_main(config: str) -> bool:
    """Whether a configuration is of the shape that the documentation shows: head dimension 128, bf16, default page."""
    words = set(config.split())
    return {"D128", "bf16"} <= words and not {"P16", "P64"} & words


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table without problems."""
    cells = [COLUMNS, ["---"] * len(COLUMNS), *([_cell(row[name]) for name in COLUMNS] for row in rows)]  # type: ignore[literal-required]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _cell(value: object) -> str:
    return "-" if value is None else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kvpress_kernels.compile_report", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--op", nargs="+", default=list(ops.OPS), choices=ops.OPS, metavar="NAME", help="ops to compile"
    )
    parser.add_argument("--arch", nargs="+", default=list(DEVICES), choices=list(DEVICES), help="architectures")
    parser.add_argument("--main", action="store_true", help="only the configurations that the documentation shows")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON list of rows")
    form.add_argument("--markdown", action="store_true", help="print the main configurations as a Markdown table")
    parser.add_argument("--cached", action="store_true", help="use Triton's cache instead of compiling everything anew")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="kvpress-compile-") as folder:
        if not options.cached:
            use_cache(folder)
        started = time.monotonic()
        work = cases(options.op, options.arch)
        rows = report([item for item in work if is_main(item[0].config)] if options.markdown or options.main else work)
    bad = sum(bool(row["problems"]) for row in rows)
    print(json.dumps(rows, indent=1) if options.json else markdown(rows) if options.markdown else table(rows))
    print(
        f"{len(rows)} configurations compiled by triton {triton.__version__} in {time.monotonic() - started:.0f} s; "
        f"{bad} with problems",
        file=sys.stderr,
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
