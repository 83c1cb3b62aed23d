"""`kvpress eval`: run a sweep, resume it, report on it, and list what can be run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpress.cli.console import err, out, print_json, quiet_transformers
from kvpress_eval.cli.report import report

app = typer.Typer(
    help="Benchmarks under compression: RULER, LongBench, NeedleBench and offline stand-ins.",
    no_args_is_help=True,
)
app.command("report")(report)

SweepArgument = Annotated[
    str, typer.Argument(help="A sweep: a .yaml file, or the name of one that comes with kvpress.")
]
OutOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder of the run. [default: runs/<sweep>-<time>]")
]
ShardOption = Annotated[str, typer.Option(help="Do only share i of n of the samples: i/n.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:0; several with commas run one worker process on each.")
]
WorkersOption = Annotated[int, typer.Option(min=1, help="Worker processes on each device.")]
JsonProgress = Annotated[bool, typer.Option("--json-progress", hidden=True)]


@app.command("run")
def run(
    sweep: SweepArgument,
    out_folder: OutOption = None,
    model: Annotated[str | None, typer.Option(help="Replaces the sweep's model.")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="A folder with data files; may be given several times.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples per task.")] = None,
    length: Annotated[int | None, typer.Option(min=64, help="Length of every task that is generated to one.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of all that is drawn.")] = None,
    shard: ShardOption = "1/1",
    device: DeviceOption = None,
    workers: WorkersOption = 1,
    json_progress: JsonProgress = False,
) -> None:
    """Run a sweep; it can be stopped at any time and resumed."""
    quiet_transformers()
    from kvpress_eval.sweep import load_sweep

    folder = out_folder or Path("runs") / f"{Path(sweep).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    changes: dict[str, Any] = {"model": model, "seed": seed}
    if data:
        changes["data"] = [str(place) for place in data]
    chosen = load_sweep(sweep, length=length, limit=limit, **changes)
    _work(folder, chosen, shard, device, workers, json_progress)


@app.command("resume")
def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    shard: ShardOption = "1/1",
    device: DeviceOption = None,
    workers: WorkersOption = 1,
    json_progress: JsonProgress = False,
) -> None:
    """Go on with a run: answer what has no record yet."""
    quiet_transformers()
    _work(folder, None, shard, device, workers, json_progress)


@app.command("bench")
def bench(
    sweep: SweepArgument,
    model: Annotated[str | None, typer.Option(help="Replaces the sweep's model.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Samples per task.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:0.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """What a sweep costs beside the bare prefill and decode of plain transformers."""
    quiet_transformers()
    from kvpress_eval.bench import measure
    from kvpress_eval.runner import Runner
    from kvpress_eval.sweep import load_sweep

    figures = measure(Runner.open(load_sweep(sweep, model=model, limit=limit), None, device))
    if json_:
        print_json(figures)
        return
    for name, value in figures.items():
        out.print(f"{name.replace('_', ' '):<28} {value:.3f}" if isinstance(value, float) else f"{name:<28} {value}")


@app.command("list")
def list_tasks(
    family: Annotated[str | None, typer.Argument(help="Only this family, with every task's description.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Tasks, metrics and sweeps."""
    quiet_transformers()
    from kvpress_eval.cli.listing import listing, print_listing
    from kvpress_eval.tasks import find_tasks

    if family is not None:
        find_tasks(family)
    found = listing(family)
    print_json(found) if json_ else print_listing(found, out)


def _work(folder: Path, sweep: Any, shard: str, device: str | None, workers: int, json_progress: bool) -> None:
    """Run one shard here, or several in worker processes; `sweep` is None for a run that goes on."""
    from kvpress.errors import InputError
    from kvpress_eval.progress import Bar, JsonLines
    from kvpress_eval.units import Shard

    part = Shard.parse(shard)
    devices = [name.strip() for name in device.split(",")] if device else [None]
    if len(devices) * workers > 1:
        from kvpress_eval.workers import run_workers

        if part.n > 1:
            raise InputError("--shard divides one process's work: leave it out with several workers")
        run_workers(folder, sweep, [name for name in devices for _ in range(workers)])
    else:
        from kvpress_eval.runner import Runner

        _limit_threads()
        runner = Runner.begin(sweep, folder, devices[0]) if sweep is not None else Runner.resume(folder, devices[0])
        with JsonLines() if json_progress else Bar(runner.sweep, err) as progress:
            runner.run(part, progress)
    if not json_progress:
        err.print(
            f"records are in '{folder}'; `kvpress eval report {folder}` shows them", highlight=False, soft_wrap=True
        )


def _limit_threads() -> None:
    """Workers on one CPU share its cores instead of each taking all of them."""
    share = os.environ.get("KVPRESS_THREADS", "")
    if share.isdecimal() and int(share) > 0:
        import torch

        torch.set_num_threads(int(share))
