"""Forest plot: the difference of every task with its interval, one panel for each arm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from kvpress_eval.records import FULL
from kvpress_eval.report.plots.drawing import BAD, GOOD, INK, LINE, MUTED, UNSURE, drawing, to_svg
from kvpress_eval.report.rows import MacroRow, Row

COLOURS = {"no loss": GOOD, "loss": BAD, "undecided": UNSURE, None: UNSURE}
_COLUMNS = 5


def forest(rows: Sequence[Row], macro: Sequence[MacroRow], margin: float, label: str) -> str:
    """Rows of one family, length and mode; macro: its macro rows of scope "all". margin: of a task, in points.

    Panels are in the order of the macro rows. A filled point has an interval; a hollow one has too few clusters for any.
    """
    arms = [row.arm for row in macro if row.arm != FULL]
    tasks = list(dict.fromkeys(row.task for row in rows))
    by_cell = {(row.task, row.arm): row for row in rows}
    every: list[Row | MacroRow] = [*rows, *macro]
    ends = [end for row in every for end in (row.ci_low, row.ci_high, row.delta) if end is not None]
    left, right = min([-10.0, *ends]), max([10.0, *ends])
    columns = min(_COLUMNS, len(arms))
    lines = math.ceil(len(arms) / columns)
    with drawing(1.55 + 1.55 * columns, lines * (0.75 + 0.185 * (len(tasks) + 1))) as figure:
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes, arm in zip(grid.flat, arms, strict=False):
            axes.axvline(0, color=MUTED, linewidth=0.9)
            axes.axvline(-margin, color=MUTED, linewidth=0.7, linestyle=(0, (3, 2)))
            of_tasks = [(height, by_cell.get((task, arm))) for height, task in enumerate(tasks)]
            total = next(row for row in macro if row.arm == arm)
            for height, row in [*of_tasks, (len(tasks) + 0.4, total)]:
                if row is None or row.delta is None:
                    continue
                colour, is_macro = COLOURS[row.verdict], isinstance(row, MacroRow)
                if row.ci_low is not None and row.ci_high is not None:
                    axes.plot(
                        [row.ci_low, row.ci_high], [height, height], color=colour, linewidth=2.2 if is_macro else 1.3
                    )
                hollow: dict[str, Any] = {} if row.ci_low is not None else {"markerfacecolor": "none"}
                axes.plot(
                    [row.delta], [height], color=colour, marker="D" if is_macro else "o", markersize=4.5, **hollow
                )
            axes.axhline(len(tasks) - 0.3, color=LINE, linewidth=0.6)
            axes.set_title(arm if len(arm) <= 20 else arm[:19] + "…", loc="left", fontsize=9, color=INK)
            axes.set(xlim=(left - 4, right + 4), ylim=(len(tasks) + 1, -0.7))
            names = [task.rpartition("/")[2] for task in tasks]
            axes.set_yticks([*range(len(tasks)), len(tasks) + 0.4], [*names, "macro"], fontsize=8.5)
            axes.tick_params(length=0)
            axes.spines["left"].set_visible(False)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        for axes in list(grid.flat)[len(arms) :]:
            axes.set_visible(False)
        figure.supxlabel("difference to the full cache, points", color=MUTED, fontsize=9)
        return to_svg(figure, label)
