"""How many answers each arm lost, and in which stage: stacked bars, one panel for each budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.patches import Patch

from kvpress_eval.diagnostic.report.plots.panels import cut, lines_of, panels, width_of
from kvpress_eval.diagnostic.report.verdicts import LOST, VerdictRow
from kvpress_eval.report.plots.drawing import INK, LINE, MUTED, SERIES, drawing, to_svg

_COLUMNS = 4
COLOURS = dict(zip(LOST, (SERIES[0], SERIES[1], SERIES[2], SERIES[5]), strict=True))


def verdicts(by_budget: Mapping[str, Sequence[VerdictRow]], names: Mapping[str, str], label: str) -> str:
    """by_budget: title -> rows. The length of a bar is the percent of the answers that the arm lost."""
    arms = list(dict.fromkeys(row.arm for rows in by_budget.values() for row in rows))
    height = lines_of(len(by_budget), _COLUMNS) * (0.7 + 0.25 * len(arms)) + 0.35
    with drawing(width_of(len(by_budget), _COLUMNS, 1.6), height) as figure:
        grid = panels(figure, list(by_budget), _COLUMNS, sharex=True, sharey=True)
        widest = max((100 * row.lost / row.n for rows in by_budget.values() for row in rows if row.n), default=1.0)
        for axes, rows in zip(grid, by_budget.values(), strict=True):
            for row in rows:
                place, start = arms.index(row.arm), 0.0
                for name in LOST:
                    width = 100 * row.counts[name] / max(row.n, 1)
                    axes.barh([place], [width], left=start, height=0.66, color=COLOURS[name])
                    start += width
                rest = 100 * (row.lost - row.replayed) / max(row.n, 1)
                if rest > 0:
                    axes.barh(
                        [place], [rest], left=start, height=0.66, facecolor="none", edgecolor=MUTED, linewidth=0.8
                    )
                axes.annotate(
                    f"{row.lost}", (start + max(rest, 0.0), place), xytext=(4, 0), textcoords="offset points", va="center",
                    fontsize=8, color=INK,
                )  # fmt: skip
            axes.set_yticks(range(len(arms)), [cut(names.get(arm, arm), 24) for arm in arms], fontsize=8.5)
            axes.set(ylim=(len(arms) - 0.4, -0.6), xlim=(0, max(1.0, 1.14 * widest)))
            axes.grid(axis="x", color=LINE)
            axes.set_axisbelow(True)
            axes.spines["left"].set_visible(False)
        figure.supxlabel(
            "answers lost, percent of all; the number behind a bar is their count", color=MUTED, fontsize=9
        )
        handles = [Patch(color=COLOURS[name], label=name) for name in LOST]
        handles.append(Patch(facecolor="none", edgecolor=MUTED, label="not replayed"))
        figure.legend(handles=handles, loc="outside upper left", ncols=5, frameon=False, fontsize=8.5)
        return to_svg(figure, label)
