"""`kvpress train`: projections, and ranks for them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpress.cli.console import err, out, print_json, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: of progress, where it is not drawn
SECONDS_BETWEEN_LINES = 30.0

app = typer.Typer(
    help="Train projections of keys and values (MatryoshkaKV), and search their ranks.", no_args_is_help=True
)

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Hub id, model folder or .gguf file.")]
RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="Name in configs/calibration, or a .yaml file.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@app.command("projections")
def projections(
    model: ModelOption,
    output: Annotated[Path, typer.Option("--out", "-o", help="Folder of the training; one that was begun goes on.")],
    recipe: RecipeOption = "python",
    steps: Annotated[
        int | None, typer.Option(min=0, help="Steps of the optimiser; 0 keeps the start. Default: the recipe's.")
    ] = None,
    start: Annotated[str | None, typer.Option(help="pca, query, planes, dct or random; default: the recipe's.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**31 - 1, help="Of everything that training draws; default: the recipe's.")
    ] = None,
    judge: Annotated[
        bool, typer.Option(help="Whether the result is judged, which reads the judging text for every start.")
    ] = True,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the projection of a model, and judge it beside its start and PCA.

    Writes projection.safetensors, the curve and the state to the folder.
    """
    from kvpress.matryoshka.recipe import Start, load_recipe

    chosen = load_recipe(recipe)
    changed = {name: value for name, value in (("steps", steps), ("seed", seed)) if value is not None}
    update: dict[str, Any] = {"training": chosen.training.model_copy(update=changed)}
    if start is not None:
        update["start"] = _checked(Start, {**chosen.start.model_dump(), "kind": start}, "start")
    chosen = chosen.model_copy(update=update)
    loaded, tokenizer = _load(model, dtype, device)
    from kvpress.matryoshka.curve import draw_curve
    from kvpress.matryoshka.make import judged_table, train_projection
    from kvpress.matryoshka.training_state import Point, points

    with _Bar("reading") as reading, _Bar("training") as bar:

        def watch(point: Point) -> None:
            reading.close()  # only one bar is live at a time
            kl = None if point.judge_kl is None else f"training, KL {point.judge_kl:.4f}"
            bar(point.step, chosen.training.steps, kl)

        projection, starts = train_projection(loaded, tokenizer, chosen, Path(model).name, output, watch, reading)
    title = f"{Path(model).name}: {chosen.start.kind}, trained"
    if not draw_curve(points(output / "curve.jsonl"), output / "curve.svg", title):
        err.print("no curve.svg: it needs matplotlib (pip install matplotlib)", highlight=False)
    rows: list[dict[str, Any]] = []
    if judge:
        arms = {kind: starts.bases(kind) for kind in dict.fromkeys(("random", "pca", chosen.start.kind))}
        arms["trained"] = projection.bases
        with _Bar("judging") as bar:
            rows = judged_table(loaded, tokenizer, chosen, arms, None, bar)
    if judge or as_json:
        _show(rows, as_json, {"model": model, "projection": str(output / "projection.safetensors"), "recipe": recipe})
    err.print(f"projection: {output / 'projection.safetensors'}", markup=False, highlight=False, soft_wrap=True)


@app.command("ranks")
def ranks(
    projection: Annotated[Path, typer.Argument(help="projection.safetensors; the tables are added to it.")],
    model: ModelOption,
    recipe: RecipeOption = "python",
    share: Annotated[
        list[float] | None,
        typer.Option("--share", "-s", help="Of the native bytes; several are possible. Default: the recipe's."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="greedy (the paper's), sensitivity, exchange or evolution; default: the recipe's."),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search the ranks of every layer, KV head and side for a share of the bytes, and judge them beside equal ranks."""
    from kvpress.matryoshka.recipe import Search, load_recipe

    chosen = load_recipe(recipe)
    changed = {**({"shares": tuple(share)} if share else {}), **({"method": method} if method else {})}
    search = _checked(Search, {**chosen.search.model_dump(), **changed}, "search")
    chosen = chosen.model_copy(update={"search": search})
    chosen = chosen.model_copy(update={"judging": chosen.judging.model_copy(update={"shares": search.shares})})
    loaded, tokenizer = _load(model, dtype, device)
    from kvpress.matryoshka.make import judged_table, search_ranks

    with _Bar("searching") as bar:
        found = search_ranks(loaded, tokenizer, chosen, projection, bar)
    with _Bar("judging") as bar:
        rows = judged_table(
            loaded,
            tokenizer,
            chosen,
            {"uniform": found.bases},
            found,
            bar,
        )
    _show(rows, as_json, {"model": model, "projection": str(projection), "recipe": recipe})


def _checked(kind: Any, fields: dict[str, Any], what: str) -> Any:
    from pydantic import ValidationError

    from kvpress.errors import InputError
    from kvpress.slots.base import describe

    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise InputError(f"{what}: {describe(error, kind)}") from None


def _load(model: str, dtype: str, device: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    quiet_transformers()
    from kvpress.loading import load

    with err.status(f"loading {model}"):
        return load(model, dtype=dtype, device=device)


class _Bar:
    """A progress bar that appears with the first thing it is told, so that a mistake before that is one line.

    Where stderr is no terminal, such as in a log, a plain line every half minute.
    """

    def __init__(self, what: str) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
        )
        self._bar = Progress(*columns, TimeRemainingColumn(), console=err, speed_estimate_period=600)
        self._line = self._bar.add_task(what, total=None)
        self._what, self._began = what, time.monotonic()
        self._said = self._began

    def __call__(self, done: int, total: int, what: str | None = None) -> None:
        now = time.monotonic()
        self._what = what or self._what
        if not err.is_terminal:
            if now - self._said >= SECONDS_BETWEEN_LINES:
                self._said = now
                err.print(f"{self._what}: {done} of {total}, {now - self._began:.0f} s", highlight=False)
            return
        self._bar.start()
        self._bar.update(self._line, completed=done, total=total)
        if what is not None:
            self._bar.update(self._line, description=what)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if err.is_terminal:
            self._bar.stop()


def _show(rows: list[dict[str, Any]], as_json: bool, head: dict[str, Any]) -> None:
    if as_json:
        print_json({**head, "rows": rows})
        return
    from rich.table import Table

    table = Table(
        box=None,
        pad_edge=False,
        title="KL to the full model (nats a token), and perplexity, on text that nothing has seen",
    )
    names = list(dict.fromkeys(row["arm"] for row in rows))
    table.add_column("share of bytes", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for share in sorted({row["share"] for row in rows}, reverse=True):
        by_name = {row["arm"]: row for row in rows if row["share"] == share}
        cells = [f"{by_name[n]['kl']:.4f}  {by_name[n]['perplexity']:.2f}" if n in by_name else "-" for n in names]
        table.add_row(f"{share:.1%}", *cells)
    out.print(table)
