"""The command line. Each command imports what it needs when it runs, so that `kvpress --help` answers at once.

Exit codes: 0 done; 1 a check of `kvpress doctor` or `kvpress demo` failed; 2 the user's mistake, told in one sentence.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from typing import Annotated, NoReturn

import typer

from kvpress import __version__
from kvpress.cli import bench, contracts, demo, doctor, generate, train
from kvpress.cli.console import err
from kvpress.errors import KvpressError

USERS_MISTAKE = 2

app = typer.Typer(
    name="kvpress",
    help="A KV cache that is really smaller, for Hugging Face causal language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("generate")(generate.generate)
app.add_typer(contracts.app, name="contracts")
app.add_typer(bench.app, name="bench")
app.add_typer(train.app, name="train")
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


def _print_version(value: bool) -> None:
    if value:
        print(f"kvpress-engine {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def add_plugins() -> None:
    """Add the commands of packages on top of this one (pyproject.toml, entry points), which nothing here imports by name."""
    known = {group.name for group in app.registered_groups}
    for entry in entry_points(group="kvpress.commands"):
        if entry.name not in known:
            app.add_typer(entry.load(), name=entry.name)


def main() -> NoReturn:
    """Entry point of the console script."""
    add_plugins()
    try:
        app()
    except KvpressError as error:
        _stop(str(error))
    except (MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError is a RuntimeError, and a CPU's allocator has no type of its own
        if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
            _stop("out of memory: use a shorter document, a smaller budget, a smaller dtype or another device")
        raise
    sys.exit(0)


def _stop(sentence: str) -> NoReturn:
    err.print(f"error: {sentence}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(USERS_MISTAKE)
