"""`kvpress eval`: run a sweep, resume it, report on it, and list what can be run."""

from __future__ import annotations

from typing import Annotated

import typer

from kvpress.cli.console import out, print_json, quiet_transformers
from kvpress_eval.cli.report import report
from kvpress_eval.cli.work import SweepArgument, add_work

app = typer.Typer(
    help="Benchmarks under compression: RULER, LongBench, NeedleBench and offline stand-ins.",
    no_args_is_help=True,
)
app.command("report")(report)
add_work(app, "eval", lambda sweep: None)


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
