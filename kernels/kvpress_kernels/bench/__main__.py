"""`python -m kvpress_kernels.bench`: check, time, print a table and write the rows as JSON."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
import triton

from kvpress_kernels import ops
from kvpress_kernels.bench.measurement import Measurement, Row, gate, measure, table
from kvpress_kernels.bench.shapes import FULL, TINY, Scale
from kvpress_kernels.bench.timing import Timer, copy_bandwidth, graph_timer
from kvpress_kernels.check.inputs import FULL as CHECK_FULL
from kvpress_kernels.check.inputs import SMALL as CHECK_SMALL
from kvpress_kernels.check.suite import check, device_name
from kvpress_kernels.launch import INTERPRETED


def measurements(op: str, scale: Scale, device: torch.device) -> Iterator[Measurement]:
    """What is measured of an op."""
    found: Iterator[Measurement] = import_module(f"kvpress_kernels.bench.{op}").measurements(scale, device)
    return found


def checked(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "ok", or why the op gets no time: its cases of the measured dtype at the first head dimension."""
    size = CHECK_SMALL if INTERPRETED else CHECK_FULL
    few = replace(size, dims=size.dims[:1], groups=size.groups[:1], dtypes=(dtype,))
    return gate(check(op, few, device))


def run(names: Sequence[str], scale: Scale, device: torch.device, timer: Timer, copy_bytes: int = 1 << 30) -> list[Row]:
    """Rows of all measurements of the named ops; the first row is the copy bandwidth."""
    copy = copy_bandwidth(device, timer, copy_bytes)
    rows: list[Row] = [{"op": "copy", "bytes": 2 * copy_bytes, "tb_per_s": copy / 1e12}]
    for op in names:
        verdict = checked(op, device, scale.dtype)
        for work in measurements(op, scale, device):
            rows.append(measure(work, device, timer, copy, verdict, scale.rotation))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def main(arguments: Sequence[str] | None = None, timer: Timer = graph_timer) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvpress_kernels.bench")
    parser.add_argument("--op", nargs="+", default=list(ops.OPS), choices=ops.OPS, metavar="NAME", help="ops to time")
    parser.add_argument("--json", metavar="FILE", help="where to write the rows; docs/results/<device>.json by default")
    options = parser.parse_args(arguments)
    name = device_name()
    if name is None or (INTERPRETED and timer is graph_timer):
        print("No CUDA or ROCm device here: there is nothing to time.")
        return 2
    device, scale = (torch.device("cpu"), TINY) if INTERPRETED else (torch.device("cuda"), FULL)
    rows = run(options.op, scale, device, timer, 1 << 12 if INTERPRETED else 1 << 30)
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}, copy {rows[0]['tb_per_s']:.2f} TB/s")
    print(table(rows[1:]))
    path = Path(options.json or f"docs/results/{name.replace(' ', '-')}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    heading = {"device": name, "torch": torch.__version__, "triton": triton.__version__}
    path.write_text(json.dumps({**heading, "rows": rows}, indent=1) + "\n")
    print(f"written to {path}")
    return 1 if any(row.get("gate", "ok") != "ok" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
