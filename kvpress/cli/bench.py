"""`kvpress bench`: measures this machine; every figure stands with its setting."""

from __future__ import annotations

from typing import Annotated

import typer

from kvpress.cli.console import out, print_json, quiet_transformers

app = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)


@app.callback()
def _keep_subcommands() -> None:
    # without a callback typer folds a single command into `kvpress bench`
    pass


@app.command("decode")
def decode(
    context: Annotated[int, typer.Option(min=256, help="Tokens in the cache.")] = 8192,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Hub id, folder or .gguf; default: Qwen2.5-0.5B's shape.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    steps: Annotated[int, typer.Option(min=1, help="Decode steps of one repeat.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats; the median of all steps is reported.")] = 5,
    layers: Annotated[int | None, typer.Option(min=1, help="Cut the default model to so many layers.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Decode speed against transformers' own cache and against the floor set by the weights."""
    quiet_transformers()
    from kvpress.bench.decode import print_decode_bench, run_decode_bench

    result = run_decode_bench(context=context, model=model, dtype=dtype, steps=steps, repeats=repeats, layers=layers)
    if as_json:
        print_json(result)
    else:
        print_decode_bench(result, out)
