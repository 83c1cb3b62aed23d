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


@app.command("step")
def step(
    shape: Annotated[
        str, typer.Option(help="llama-3.1-8b, qwen2.5-0.5b or tiny; weights are random.")
    ] = "llama-3.1-8b",
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 8,
    context: Annotated[int, typer.Option(min=16, help="Tokens of context of each.")] = 32768,
    budget: Annotated[float, typer.Option(min=0, max=1, help="Share of the context that is kept.")] = 0.25,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps; the median is reported.")] = 20,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    backend: Annotated[str, typer.Option(help="auto, torch or triton.")] = "auto",
    store: Annotated[str, typer.Option(help="auto, packed or paged.")] = "auto",
    page_size: Annotated[int, typer.Option(help="16, 32 or 64.")] = 32,
    static: Annotated[bool, typer.Option("--static/--no-static", help="Also time StaticCache + compile.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """One captured decode step of a large model against its byte floor and transformers' static cache."""
    quiet_transformers()
    from kvpress.backend import BackendRequest
    from kvpress.bench.step import print_step_bench, run_step_bench

    result = run_step_bench(
        shape=shape, batch=batch, context=context, budget=budget, steps=steps, dtype=dtype,
        request=BackendRequest(backend, store, page_size), static=static,
    )  # fmt: skip
    if as_json:
        print_json(result)
    else:
        print_step_bench(result, out)
