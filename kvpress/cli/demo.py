"""`kvpress demo`: a small real model answers questions on a document with the full cache and with half of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvpress.cli.console import err, megabytes, out, print_json, quiet_transformers

if TYPE_CHECKING:
    from rich.table import Table

    from kvpress.demo.run import Answer


def demo(
    budget: Annotated[float, typer.Option(help="Share of the prompt that the contracts keep.")] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one.")] = None,
) -> None:
    """Full cache and two contracts side by side, on a real model and document (1 to 2 minutes on 2 CPU cores).

    Exit code 1 if the selector that reads the question (snapkv) loses an answer that the full cache gets right.
    """
    quiet_transformers()
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from kvpress.demo.data import read_questions
    from kvpress.demo.model import load_demo_model
    from kvpress.demo.run import CONTRACTS, answers, arms, lost_answers

    arms(budget)  # refuses an impossible budget before anything is downloaded
    model, tokenizer = load_demo_model(
        lambda line: err.print(line, markup=False, highlight=False), dtype=dtype, device=device
    )
    given: list[Answer] = []
    total = len(read_questions()) * len(arms(budget))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("answering", total=total)
        for answer in answers(model, tokenizer, budget):
            given.append(answer)
            progress.advance(task)
    lost = lost_answers(given, CONTRACTS[0])
    if as_json:
        print_json(
            {
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": str(model.device),
                "budget": budget,
                "answers": [to_dict(answer) for answer in given],
                "lost": [question.text for question in lost],
            }
        )
    else:
        prompt = given[0].run.prompt_tokens
        out.print(f"\nSmolLM2-135M-Instruct, {model.dtype}, {model.device}; prompts of about {prompt:,} tokens\n")
        out.print(answer_table(given))
        out.print()
        out.print(cost_table(given))
        words = "kept every answer that the full cache gets right" if not lost else f"lost {len(lost)} of its answers"
        out.print(f"\n{CONTRACTS[0]} at {budget:.0%} {words}.")
    if lost:
        raise typer.Exit(1)


def to_dict(answer: Answer) -> dict[str, object]:
    """JSON-able form of one answer, without the report of each layer."""
    figures = answer.run.to_dict()
    figures.pop("report", None)
    return {"question": answer.question.text, "right": answer.right, **figures}


def by_arm(given: list[Answer]) -> dict[str, list[Answer]]:
    """Answers by the name of their arm, in the order in which the arms ran."""
    grouped: dict[str, list[Answer]] = {}
    for answer in given:
        grouped.setdefault(answer.run.contract, []).append(answer)
    return grouped


def answer_table(given: list[Answer]) -> Table:
    """Each question with the answer of each arm, right ones in green."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.HORIZONTALS, pad_edge=False, show_lines=True)
    table.add_column("question", ratio=2)
    grouped = by_arm(given)
    for name in grouped:
        table.add_column(name, ratio=3)
    for row in zip(*grouped.values(), strict=True):
        marked = [f"{'right' if answer.right else 'WRONG'}: {answer.run.text}" for answer in row]
        styles = ["green" if answer.right else "red" for answer in row]
        table.add_row(row[0].question.text, *(Text(*cell) for cell in zip(marked, styles, strict=True)))
    return table


def cost_table(given: list[Answer]) -> Table:
    """Right answers and mean cost of each arm."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("right", "cache", "prefill", "decode"):
        table.add_column(name, justify="right")
    for name, rows in by_arm(given).items():
        runs = [answer.run for answer in rows]
        decoded = sum(run.new_tokens - 1 for run in runs)
        seconds = sum(run.decode_seconds for run in runs)
        table.add_row(
            name,
            f"{sum(answer.right for answer in rows)} of {len(rows)}",
            megabytes(sum(run.cache_bytes for run in runs) // len(runs)),
            f"{sum(run.prefill_seconds for run in runs) / len(runs):.2f} s",
            f"{decoded / seconds:.1f} tokens/s" if seconds else "-",
        )
    return table
