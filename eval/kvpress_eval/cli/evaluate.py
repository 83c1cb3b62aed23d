"""`kvpress eval`: run a sweep, resume it, report on it, and list what can be run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from kvpress.cli.console import err, out, print_json, quiet_transformers
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


@app.command("text")
def text(
    sweep: SweepArgument,
    output: Annotated[Path, typer.Option("--out", "-o", help="File of records (.jsonl); one that was begun goes on.")],
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Whose judging text is read (configs/calibration).")
    ] = "python",
    model: Annotated[str | None, typer.Option(help="Replaces the sweep's model.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 16,
    window: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 2048,
    rest: Annotated[int, typer.Option(min=2, help="Of these, tokens behind the context.")] = 128,
    pair: Annotated[
        list[str] | None,
        typer.Option("--pair", metavar="ARM:ARM", help="Also the paired difference of two arms; several are possible."),
    ] = None,
    of: Annotated[
        str | None, typer.Option(metavar="ARM", help="Whose bytes are 100 %; by default those of the model's dtype.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:0.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Perplexity and divergence of a text that goes on from a compressed context, under the contracts of a sweep."""
    quiet_transformers()
    from kvpress.loading import load
    from kvpress.matryoshka.checkpoint import model_fingerprint
    from kvpress.matryoshka.recipe import load_recipe
    from kvpress.matryoshka.text import Text
    from kvpress_eval.continuation import check_arms, compared, measure_windows, summary
    from kvpress_eval.sweep import load_sweep

    chosen, source = load_sweep(sweep, model=model), load_recipe(recipe)
    arms = chosen.arms()
    check_arms(arms)
    names = [arm.name for arm in arms]
    pairs = [_pair(one, names) for one in pair or ()]
    if of is not None:
        _known_arm(f"--of {of}", of, names)
    with err.status(f"loading {chosen.model}"):
        loaded, tokenizer = load(chosen.model, dtype=chosen.dtype, device=device)
    read = Text(source.text, "judge", tokenizer, window, windows)
    drawn = read.ids
    what = f"{model_fingerprint(loaded)} {loaded.dtype} {rest}"
    digest = hashlib.sha256(drawn.numpy().tobytes() + what.encode()).hexdigest()[:16]
    with err.status("reading") as status:

        def watch(done: int, total: int) -> None:
            status.update(f"reading: {done} of {total} windows")

        records = measure_windows(loaded, tokenizer, arms, drawn, rest, output, digest, watch, read.documents)
    rows, differences = summary(records, of), compared(records, pairs)
    if json_:
        print_json(
            {
                "model": chosen.model,
                "recipe": recipe,
                "text": digest,
                "window": window,
                "rest": rest,
                "windows": len(drawn),
                "bytes_of": of,
                "rows": rows,
                "pairs": differences,
            }
        )
        return
    table = Table(
        box=None,
        pad_edge=False,
        title=f"{len(drawn)} windows of {window:,} tokens, the last {rest} read from the compressed context",
    )
    for name in ("arm", "share of bytes", "perplexity", "KL to full", "95 %", "loss change", "95 %"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for row in rows:
        cells = [f"{row['byte_share']:.1%}", f"{row['perplexity']:.3f}"]
        for name, form in (("kl", ".4f"), ("loss_change", "+.4f")):
            cells += [format(row[name], form), _interval(row, name, form)]
        table.add_row(str(row["arm"]), *cells)
    out.print(table)
    for row in differences:
        out.print(
            f"{row['arm']} less {row['than']}: KL {row['kl']:+.4f} {_interval(row, 'kl', '+.4f')}, loss {row['loss']:+.4f} "
            f"{_interval(row, 'loss', '+.4f')}, KL lower in {row['lower']} of {row['windows']} windows",
            highlight=False,
            markup=False,
        )


def _interval(row: dict[str, Any], name: str, form: str) -> str:
    ends = row[f"{name}_low"], row[f"{name}_high"]
    return "-" if None in ends else f"[{ends[0]:{form}}, {ends[1]:{form}}]"


def _pair(given: str, arms: list[str]) -> tuple[str, str]:
    """Two arms, written ARM:ARM."""
    one, _, other = given.partition(":")
    for name in (one, other):
        _known_arm(f"--pair {given}", name, arms)
    return one, other


def _known_arm(option: str, name: str, arms: list[str]) -> None:
    from kvpress.errors import InputError

    if name not in arms:
        raise InputError(f"{option}: '{name}' is no arm of the sweep, which has {', '.join(arms)}")


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
