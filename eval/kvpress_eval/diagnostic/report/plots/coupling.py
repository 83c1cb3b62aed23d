"""Coupling phi of a task against the lift of each arm, one point for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvpress_eval.diagnostic.report.plots.panels import colour_of, lines_of, panels, width_of
from kvpress_eval.diagnostic.report.sign_rows import CouplingRow
from kvpress_eval.report.plots.drawing import LINE, MUTED, drawing, to_svg

_COLUMNS = 4


def coupling(by_arm: Mapping[str, Sequence[CouplingRow]], threshold: float, label: str) -> str:
    """by_arm: title -> tasks with a known phi. threshold: below it phi is low."""
    n = len(by_arm)
    highest = max((row.phi or 0.0 for rows in by_arm.values() for row in rows), default=0.0)
    with drawing(width_of(n, _COLUMNS, 0.7), 0.7 + 1.6 * lines_of(n, _COLUMNS)) as figure:
        for axes, rows in zip(
            panels(figure, list(by_arm), _COLUMNS, sharex=True, sharey=True), by_arm.values(), strict=True
        ):
            axes.axhline(0, color=MUTED, linewidth=0.8)
            axes.axvline(threshold, color=LINE, linewidth=1.2, linestyle=(0, (4, 3)))
            for row in rows:
                if row.phi is None or row.delta.value is None:
                    continue
                colour = colour_of(row.delta)
                if row.delta.low is not None and row.delta.high is not None:
                    axes.plot(
                        [row.phi, row.phi], [row.delta.low, row.delta.high], color=colour, linewidth=1.2, alpha=0.7
                    )
                axes.plot([row.phi], [row.delta.value], color=colour, marker="o", markersize=4.5, linestyle="none")
            axes.set_xlim(-0.03, max(2 * threshold, highest) + 0.03)
        figure.supxlabel("coupling phi of the task", color=MUTED, fontsize=9)
        figure.supylabel("lift, points", color=MUTED, fontsize=9)
        return to_svg(figure, label)
