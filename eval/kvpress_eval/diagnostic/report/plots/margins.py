"""Margins against lifts, one point for each cell and one panel for each arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.lines import Line2D

from kvpress_eval.diagnostic.report.plots.panels import lines_of, panels, width_of
from kvpress_eval.diagnostic.report.sign_rows import CellRow
from kvpress_eval.diagnostic.report.words import budget_words
from kvpress_eval.report.plots.drawing import LINE, MARKERS, MUTED, SERIES, drawing, to_svg

_COLUMNS = 4


def margins(by_arm: Mapping[str, Sequence[CellRow]], budgets: Sequence[str], label: str) -> str:
    """by_arm: title -> cells. Bars are one standard error to each side; the grey diagonal is where the host's noise moves a cell."""
    cells = [cell for rows in by_arm.values() for cell in rows]
    low_x, high_x = _reach([cell.margin for cell in cells])
    low_y, high_y = _reach([cell.delta for cell in cells])
    n = len(by_arm)
    with drawing(width_of(n, _COLUMNS, 0.7), 0.7 + 1.9 * lines_of(n, _COLUMNS)) as figure:
        for axes, rows in zip(
            panels(figure, list(by_arm), _COLUMNS, sharex=True, sharey=True), by_arm.values(), strict=True
        ):
            axes.axhline(0, color=MUTED, linewidth=0.8)
            axes.axvline(0, color=MUTED, linewidth=0.8)
            axes.axline((0, 0), slope=1, color=LINE, linewidth=1.4, linestyle=(0, (4, 3)))
            for cell in rows:
                rank = budgets.index(cell.key.budget) if cell.key.budget in budgets else 0
                axes.errorbar(
                    [cell.margin], [cell.delta],
                    xerr=None if cell.margin_error is None else [cell.margin_error],
                    yerr=None if cell.delta_error is None else [cell.delta_error],
                    color=SERIES[rank % len(SERIES)], marker=MARKERS[rank % len(MARKERS)], markersize=4, linestyle="none",
                    ecolor=LINE, elinewidth=0.8,
                )  # fmt: skip
            axes.set(xlim=(low_x, high_x), ylim=(low_y, high_y))
        handles = [
            Line2D([], [], color=SERIES[rank % len(SERIES)], marker=MARKERS[rank % len(MARKERS)], markersize=4, linestyle="none",
                   label=budget_words(budget))
            for rank, budget in enumerate(budgets)
        ]  # fmt: skip
        handles.append(Line2D([], [], color=LINE, linewidth=1.4, linestyle=(0, (4, 3)), label="noise of the host"))
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=8.5)
        figure.supxlabel("margin: full cache minus host, points", color=MUTED, fontsize=9)
        figure.supylabel("lift: arm minus host, points", color=MUTED, fontsize=9)
        return to_svg(figure, label)


def _reach(values: Sequence[float]) -> tuple[float, float]:
    low, high = min([-5.0, *values]), max([5.0, *values])
    room = 0.08 * (high - low)
    return low - room, high + room
