"""`kvpress bench`: measures this machine; every figure stands with its setting."""

from __future__ import annotations

from typing import Annotated

import typer

from kvpress.cli.console import err, out, print_json, quiet_transformers

app = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)


@app.callback()
def _keep_subcommands() -> None:
    # without a callback typer folds a single command into `kvpress bench`
    pass
