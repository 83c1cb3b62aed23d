"""Tables for the terminal: all columns where there are a hundred characters, the most telling ones at eighty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvpress_eval.report.noise import noise_totals
from kvpress_eval.report.rows import MacroRow, NoiseRow, Row
from kvpress_eval.report.summary import Summary
from kvpress_eval.report.text import DASH, MODES, count, interval, length_name, number, probability, signed, size
from kvpress_eval.statistics.noise import MIN_REPEATS

#: columns that a narrow terminal leaves out
_WIDE = {"p", "of full", "retained", "lost", "won"}
#: characters from which all columns fit
WIDE = 100
_COLOURS = {"no loss": "green", "loss": "red", "undecided": "yellow"}


def tables(summary: Summary, *, details: bool = True, width: int = WIDE) -> Group:
    """Macro tables first, then, with details, every task; at the end what a reader must know. width: in characters."""
    narrow = width < WIDE
    parts: list[Table | Text] = [*_macro_tables(summary, narrow)]
    if details:
        parts += _task_tables(summary, narrow)
    if summary.noise:
        parts.append(_noise_table(summary.noise))
    parts += [Text(f"{task}: {caveat}", style="yellow") for task, caveat in summary.caveats.items()]
    parts += [Text(problem.text, style="yellow") for problem in summary.problems]
    margins = ", ".join(f"{name} {100 * margin:g}" for name, margin in summary.margins.items())
    parts.append(
        Text(
            f"Points of 100. Interval: 95 %, paired, by cluster. No loss: a loss of the margin ({margins}) or more "
            f"is excluded at 5 %. Both p: Holm in each macro table, Benjamini-Hochberg over all tasks. * incomplete. "
            f"~ in noise: inside the 95 % interval of the full cache's own repeat, of {MIN_REPEATS} items or more. † fewer than three items changed: worst-case bound.",
            style="dim",
        )
    )
    return Group(*parts)


def _macro_tables(summary: Summary, narrow: bool) -> Iterator[Table]:
    groups = groupby(summary.macro, lambda row: (row.family, row.length, row.mode, row.scope))
    complete = {(r.family, r.length, r.mode, r.n_tasks) for r in summary.macro if r.scope == "all"}
    for (family, length, mode, scope), found in groups:
        rows = list(found)
        n_tasks = rows[0].n_tasks
        if scope != "all" and (family, length, mode, n_tasks) in complete:
            continue  # the same tasks as above
        scopes = {
            "all": "mean of",
            "informative": "without floor and ceiling:",
            "floor or ceiling": "only floor and ceiling:",
        }
        items = count(min(row.n_min for row in rows), max(row.n_max for row in rows))
        table = _table(
            f"{family}, {length_name(length)}, {MODES[mode]}: {scopes[scope]} {n_tasks} task{'s' * (n_tasks > 1)} of {items} items"
        )
        cells = [
            {
                "score": number(row.score),
                "Δ": signed(row.delta),
                "95 % interval": interval(row),
                "p": probability(row.p_adjusted),
                "of full": f"{100 * row.byte_share:.0f} %",
                "cache": size(row.kept_bytes),
                "retained": DASH if row.retention is None else f"{row.retention:.0f} %",
            }
            for row in rows
        ]
        yield _filled(table, rows, cells, narrow)


def _task_tables(summary: Summary, narrow: bool) -> Iterator[Table]:
    for (task, length, mode), found in groupby(summary.rows, lambda row: (row.task, row.length, row.mode)):
        rows = list(found)
        table = _table(
            f"{task}, {length_name(length)}, {MODES[mode]}: {rows[0].n} items in {rows[0].n_clusters} clusters"
        )
        cells = [
            {
                "score": number(row.score),
                "Δ": signed(row.delta),
                "95 % interval": interval(row),
                "p": probability(row.p_adjusted),
                "lost": DASH if row.delta is None else str(row.lost),
                "won": DASH if row.delta is None else str(row.gained),
                "retained": f"{row.kept}/{row.solved}",
                "cache": size(row.cost.kept_bytes),
            }
            for row in rows
        ]
        yield _filled(table, rows, cells, narrow)


def _noise_table(rows: list[NoiseRow]) -> Table:
    table = _table("noise floor: the full cache twice, through other kernels")
    for name in ("tasks", "items", "other text", "other score", "flips", "Δ", "mean |Δ|"):
        table.add_column(name, justify="right", no_wrap=True)
    for total in noise_totals(rows):
        name = f"{total.family}, {length_name(total.length)}, {MODES[total.mode]}"
        counts = [total.n_tasks, total.n, total.other_text, total.changed, total.flips]
        table.add_row(Text(name), *map(str, counts), signed(total.delta), number(total.mean_abs))
    return table


def _table(title: str) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", overflow="fold", min_width=18)
    return table


def _filled(table: Table, rows: Sequence[Row | MacroRow], cells: Sequence[dict[str, str]], narrow: bool) -> Table:
    """The table with a line for each row: the arm, its cells by column, the verdict."""
    names = [name for name in cells[0] if not (narrow and name in _WIDE)]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row, cell in zip(rows, cells, strict=True):
        table.add_row(_arm(row), *(cell[name] for name in names), _verdict(row))
    return table


def _arm(row: Row | MacroRow) -> Text:
    return Text(row.arm + " *" * row.incomplete)


def _verdict(row: Row | MacroRow) -> Text:
    if row.verdict is None:
        return Text("")
    return Text(row.verdict + " ~" * bool(row.within_noise), style=_COLOURS[row.verdict])
