"""Lift over the host by budget: every trajectory as a thin line, their mean with its interval, one panel for each arm."""

from __future__ import annotations

from collections.abc import Mapping

from kvpress_eval.diagnostic.report.plots.panels import lines_of, panels, width_of
from kvpress_eval.diagnostic.report.words import budget_words
from kvpress_eval.diagnostic.trajectories import Trajectories
from kvpress_eval.report.plots.drawing import LINE, MUTED, SERIES, drawing, to_svg

_COLUMNS = 4


def trajectories(by_arm: Mapping[str, Trajectories], label: str) -> str:
    """by_arm: by title; all have the budgets of the study, from the smallest up."""
    n = len(by_arm)
    with drawing(width_of(n, _COLUMNS, 0.7), 0.7 + 1.7 * lines_of(n, _COLUMNS)) as figure:
        for axes, found in zip(panels(figure, list(by_arm), _COLUMNS, sharey=True), by_arm.values(), strict=True):
            places = range(len(found.budgets))
            axes.axhline(0, color=MUTED, linewidth=0.8)
            for each in found.each:
                axes.plot(places, each.values, color=LINE, linewidth=0.9)
            means = [each.mean for each in found.at_budget]
            axes.plot(
                places, [one.value or 0.0 for one in means], color=SERIES[0], linewidth=1.6, marker="o", markersize=4.5
            )
            for place, one in zip(places, means, strict=True):
                if one.low is not None and one.high is not None:
                    axes.plot([place, place], [one.low, one.high], color=SERIES[0], linewidth=2, alpha=0.6)
            axes.set_xticks(list(places), [budget_words(budget) for budget in found.budgets], fontsize=8.5)
            axes.set_xlim(-0.4, len(found.budgets) - 0.6)
        figure.supxlabel("budget", color=MUTED, fontsize=9)
        figure.supylabel("lift, points", color=MUTED, fontsize=9)
        return to_svg(figure, label)
