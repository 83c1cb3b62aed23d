"""`kvpress diagnose`: which stage of a contract lost an answer, over a study and on one sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvpress.cli.console import err, out, print_json, quiet_transformers
from kvpress.files import write_atomically
from kvpress_eval.cli.work import add_work
from kvpress_eval.plugins import needs_extra

app = typer.Typer(
    help="Why a contract works or fails: one slot swapped at a time, every failure replayed.", no_args_is_help=True
)


def _check(sweep: Any) -> None:
    """Raise InputError for a sweep that compares nothing with a host."""
    from kvpress.errors import InputError
    from kvpress_eval.diagnostic.study import Study

    if not isinstance(sweep, Study):
        raise InputError(
            f"sweep '{sweep.name}' has no 'host', so there is nothing to diagnose: name the contract that everything is "
            f"compared with, or run it with `kvpress eval run`"
        )


add_work(app, "diagnose", _check)


@app.command("report")
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs; several models are put together.")
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables; write nothing.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Where the page goes; by default RUN/report.html.")] = None,
    details: Annotated[bool, typer.Option("--details/--no-details", help="Print every table.")] = False,
) -> None:
    """Say what a study shows, stage by stage, and write a page.

    With --json, the page is written only where --html names it.
    """
    from rich.console import Console

    from kvpress_eval import manifest as manifests
    from kvpress_eval.records import read_run

    with needs_extra():
        from kvpress_eval.diagnostic.report import summarize, tables, to_html, to_json

    read = [(read_run(run), manifests.read(run)) for run in runs]
    with err.status(f"splitting and resampling {sum(len(records) for records, _ in read):,} records"):
        summary = summarize(read)
    place = html or runs[0] / "report.html"
    if html or not as_json:
        with err.status("drawing the page"):
            write_atomically(place, to_html(summary))
    if as_json:
        print_json(to_json(summary))
        return
    screen = out if out.is_terminal else Console(width=100)  # a file has no width
    screen.print(tables(summary, details=details, width=screen.width))
    err.print(f"page: {place}", markup=False, highlight=False, soft_wrap=True)


@app.command("explain")
def explain(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    sample: Annotated[str, typer.Argument(help="A sample's id, or TASK/ID.")],
    arm: Annotated[
        str | None, typer.Option(help="Such as snapkv@5%; by default one that lost the answer, the host first.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Where several tasks have the sample.")] = None,
    length: Annotated[int | None, typer.Option(help="Where the task ran at several lengths.")] = None,
    mode: Annotated[str | None, typer.Option(help="query_aware or query_agnostic, where both ran.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="The whole text, not only what matters.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show one sample: what was kept and what was lost of its text, and which stage lost it."""
    quiet_transformers()
    with needs_extra():
        from kvpress_eval.diagnostic.explain import explain as find
        from kvpress_eval.diagnostic.explain_view import to_json, view

    found = find(run, sample, arm=arm, task=task, length=length, mode=mode)
    if as_json:
        print_json(to_json(found))
    else:
        out.print(view(found, everything))
