"""What all tables of a diagnostic on the terminal share."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.table import Table
from rich.text import Text

from kvpress_eval.report.text import DASH


def kind(label: str, role: str) -> str:
    """ "transfer", "diagnostic", or the arm's role beside it."""
    return label if role == "arm" else f"{label}, {role}"


def filled(
    title: str,
    rows: Sequence[dict[str, Text | str]],
    *,
    left: Collection[str] = (),
    hide: Collection[str] = (),
    fold: Collection[str] = (),
    first: str = "",
) -> Table:
    """A table of rows by column. The first row has all columns; what a row lacks is a dash. left: columns of words; hide: left
    out; fold: may be broken."""
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    names = list(dict.fromkeys(name for row in rows for name in row if name not in hide))
    names.sort(key=lambda name: name != first)
    for name in names:
        is_left = name == first or name in left
        table.add_column(
            name,
            justify="left" if is_left else "right",
            overflow="fold",
            no_wrap=not is_left and name not in fold,
        )
    for row in rows:
        cells = [row.get(name, DASH) for name in names]
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))
    return table
