"""`kvpress eval report`: what a run shows, as tables, one JSON object, a page and a CSV file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpress.files import write_atomically
from kvpress_eval.plugins import needs_extra


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables; write nothing.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Where the page goes; default: RUN/report.html.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Where the rows go; default: RUN/report.csv.")] = None,
    details: Annotated[bool, typer.Option("--details/--no-details", help="Print a table for every task.")] = False,
) -> None:
    """Compare the arms of a run with its full cache, and write a page and a CSV file.

    With --json, files are written only where --html or --csv names them.
    """
    from rich.console import Console

    from kvpress.cli.console import err, out, print_json
    from kvpress_eval import manifest as manifests
    from kvpress_eval.records import read_run
    from kvpress_eval.report import summarize
    from kvpress_eval.report.export import to_csv, to_json

    records = read_run(run)
    with err.status(f"resampling {len(records):,} records"):
        summary = summarize(records, manifests.read(run))
    if csv or not as_json:
        write_atomically(csv or run / "report.csv", to_csv(summary))
    if html or not as_json:
        with needs_extra():
            from kvpress_eval.report.html import to_html
        with err.status("drawing the page"):
            page = to_html(summary)
        write_atomically(html or run / "report.html", page)
    if as_json:
        print_json(to_json(summary))
        return
    from kvpress_eval.report.tables import WIDE, tables

    screen = out if out.is_terminal else Console(width=WIDE)  # a file has no width
    screen.print(tables(summary, details=details, width=screen.width))
    err.print(f"page: {html or run / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    err.print(f"rows: {csv or run / 'report.csv'}", markup=False, highlight=False, soft_wrap=True)
