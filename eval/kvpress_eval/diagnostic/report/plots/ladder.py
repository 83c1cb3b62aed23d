"""The ladder of one stage: the score of every rung, one panel for each budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvpress_eval.diagnostic.report.plots.panels import colour_of, cut, lines_of, panels, width_of
from kvpress_eval.diagnostic.report.stages import Level
from kvpress_eval.records import FULL
from kvpress_eval.report.plots.drawing import INK, LINE, MUTED, drawing, to_svg

_COLUMNS = 4


def ladder(
    by_budget: Mapping[str, Sequence[Level]], names: Mapping[str, str], host: str, transfers: Sequence[str], label: str
) -> str:
    """by_budget: title -> levels from the first rung to the last; names: of arms as they are shown; transfers: drawn hollow.

    A bar is the interval of the paired difference to the host, around the host's score: it is compared with the host's line
    and not with other bars.
    """
    arms = list(dict.fromkeys(level.arm for levels in by_budget.values() for level in levels))
    height = lines_of(len(by_budget), _COLUMNS) * (0.75 + 0.27 * len(arms))
    with drawing(width_of(len(by_budget), _COLUMNS, 1.6), height) as figure:
        grid = panels(figure, list(by_budget), _COLUMNS, sharex=True, sharey=True)
        for axes, levels in zip(grid, by_budget.values(), strict=True):
            of_host = next((level.score.value for level in levels if level.arm == host), None)
            if of_host is not None:
                axes.axvline(of_host, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
            for level in levels:
                place, change, score = arms.index(level.arm), level.to_host, level.score.value
                if score is None:
                    continue
                colour = INK if level.arm in (host, FULL) else colour_of(change)
                if of_host is not None and change is not None and change.low is not None and change.high is not None:
                    ends = [max(0.0, of_host + change.low), min(100.0, of_host + change.high)]
                    axes.plot(ends, [place, place], color=colour, linewidth=2.2, alpha=0.6, solid_capstyle="butt")
                hollow: dict[str, Any] = {"markerfacecolor": "none"} if level.arm in transfers else {}
                marker = "D" if level.arm in (host, FULL) else "s" if level.arm in transfers else "o"
                axes.plot([score], [place], color=colour, marker=marker, markersize=5.5, linestyle="none", **hollow)
                axes.annotate(
                    f"{score:.0f}", (score, place), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7.5,
                    color=colour,
                )  # fmt: skip
            axes.set_yticks(range(len(arms)), [cut(names.get(arm, arm), 24) for arm in arms], fontsize=8.5)
            axes.set_ylim(len(arms) - 0.4, -0.8)
            axes.grid(axis="x", color=LINE)
            axes.set_axisbelow(True)
            axes.spines["left"].set_visible(False)
        figure.supxlabel("score, points", color=MUTED, fontsize=9)
        return to_svg(figure, label)
