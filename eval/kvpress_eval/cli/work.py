"""`run` and `resume`, the same for evaluations and diagnostics: in this process, in worker processes, or on Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from kvpress.cli.console import err, quiet_transformers

SweepArgument = Annotated[
    str, typer.Argument(help="A sweep: a .yaml file, or the name of one that comes with kvpress.")
]
OutOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder of the run; by default runs/<sweep>-<time>.")
]
ShardOption = Annotated[str, typer.Option(help="Do only share i of n of the samples: i/n.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:0; several with commas run one worker process on each.")
]
WorkersOption = Annotated[int, typer.Option(min=1, help="Worker processes on each device.")]
JsonProgress = Annotated[bool, typer.Option("--json-progress", hidden=True)]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray", metavar="ADDRESS", help="Run on a Ray cluster: HOST:PORT, auto, or local for one of its own."
    ),
]
ShardsOption = Annotated[
    int | None, typer.Option(min=1, help="With --ray: shards, by default as many as the cluster runs at once.")
]
GpusOption = Annotated[
    float | None,
    typer.Option(help="With --ray: GPUs of a shard, 0.5 for two on one; by default 1 where there are any."),
]
CpusOption = Annotated[float | None, typer.Option(help="With --ray: CPUs of a shard, and its threads; by default 1.")]


class Division(NamedTuple):
    """Who does the work, as the options say it."""

    shard: str = "1/1"
    device: str | None = None
    workers: int = 1
    ray: str | None = None
    shards: int | None = None
    gpus_per_shard: float | None = None
    cpus_per_shard: float | None = None


def add_work(app: typer.Typer, command: str, check: Callable[[Any], None]) -> None:
    """Add `run` and `resume` to a group of commands.

    command: the group's name, for what is printed. check: raises InputError for a sweep that is not for this group.
    """

    @app.command("run")
    def run(
        sweep: SweepArgument,
        out_folder: OutOption = None,
        model: Annotated[str | None, typer.Option(help="Replaces the sweep's model.")] = None,
        data: Annotated[
            list[Path] | None, typer.Option(help="A folder with data files; may be given several times.")
        ] = None,
        limit: Annotated[int | None, typer.Option(min=1, help="Samples per task.")] = None,
        length: Annotated[
            int | None, typer.Option(min=64, help="Length of every task that is generated to one.")
        ] = None,
        seed: Annotated[int | None, typer.Option(min=0, help="Seed of all that is drawn.")] = None,
        shard: ShardOption = "1/1",
        device: DeviceOption = None,
        workers: WorkersOption = 1,
        ray: RayOption = None,
        shards: ShardsOption = None,
        gpus_per_shard: GpusOption = None,
        cpus_per_shard: CpusOption = None,
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
        check(chosen)
        division = Division(shard, device, workers, ray, shards, gpus_per_shard, cpus_per_shard)
        _work(folder, chosen, division, json_progress, command)

    @app.command("resume")
    def resume(
        folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
        shard: ShardOption = "1/1",
        device: DeviceOption = None,
        workers: WorkersOption = 1,
        ray: RayOption = None,
        shards: ShardsOption = None,
        gpus_per_shard: GpusOption = None,
        cpus_per_shard: CpusOption = None,
        json_progress: JsonProgress = False,
    ) -> None:
        """Go on with a run: answer what has no record yet."""
        quiet_transformers()
        division = Division(shard, device, workers, ray, shards, gpus_per_shard, cpus_per_shard)
        _work(folder, None, division, json_progress, command)


def _work(folder: Path, sweep: Any, division: Division, json_progress: bool, command: str) -> None:
    """Work in this process, in worker processes or on Ray; `sweep` is None for a run that goes on."""
    if division.ray is not None:
        _work_on_ray(folder, sweep, division, json_progress)
    else:
        _work_here(folder, sweep, division, json_progress)
    if not json_progress:
        err.print(
            f"records are in '{folder}'; `kvpress {command} report {folder}` shows them",
            highlight=False,
            soft_wrap=True,
        )


def _work_on_ray(folder: Path, sweep: Any, division: Division, json_progress: bool) -> None:
    """Run all shards as tasks of a Ray cluster."""
    from kvpress.errors import InputError
    from kvpress_eval.ray.cluster import Share
    from kvpress_eval.ray.driver import run_on_ray

    assert division.ray is not None
    if division[:3] != Division()[:3]:
        raise InputError(
            "--ray divides the work itself: use --shards and --gpus-per-shard instead of --shard, --device and --workers"
        )
    cpus = division.cpus_per_shard
    share = Share(division.gpus_per_shard) if cpus is None else Share(division.gpus_per_shard, cpus)
    run_on_ray(folder, sweep, division.ray, division.shards, share, json_progress)


def _work_here(folder: Path, sweep: Any, division: Division, json_progress: bool) -> None:
    """Run one shard in this process, or several in worker processes."""
    from kvpress.errors import InputError
    from kvpress_eval.progress import Bar, JsonLines
    from kvpress_eval.units import Shard

    if division[3:] != Division()[3:]:
        raise InputError(
            "--shards, --gpus-per-shard and --cpus-per-shard need --ray: add --ray local, auto or HOST:PORT"
        )
    part = Shard.parse(division.shard)
    devices = [name.strip() for name in division.device.split(",")] if division.device else [None]
    if len(devices) * division.workers > 1:
        from kvpress_eval.workers import run_workers

        if part.n > 1:
            raise InputError("--shard divides one process's work: leave it out with several workers")
        run_workers(folder, sweep, [name for name in devices for _ in range(division.workers)])
    else:
        from kvpress_eval.runner import Runner

        _limit_threads()
        runner = Runner.begin(sweep, folder, devices[0]) if sweep is not None else Runner.resume(folder, devices[0])
        with JsonLines() if json_progress else Bar(runner.sweep, err) as progress:
            runner.run(part, progress)


def _limit_threads() -> None:
    """Workers on one CPU share its cores instead of each taking all of them."""
    share = os.environ.get("KVPRESS_THREADS", "")
    if share.isdecimal() and int(share) > 0:
        import torch

        torch.set_num_threads(int(share))
