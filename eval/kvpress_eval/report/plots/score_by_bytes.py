"""Macro score against measured cache bytes, with paired intervals."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from kvpress_eval.records import FULL
from kvpress_eval.report.plots.drawing import INK, LINE, MARKERS, MUTED, SERIES, drawing, spread, to_svg
from kvpress_eval.report.rows import MacroRow


def score_by_bytes(rows: Sequence[MacroRow], label: str) -> str:
    """Rows of one family, length, mode and scope, the full cache among them.

    A bar is the 95 % interval of the paired difference, added to the full cache's score and cut to the range of scores: it is
    right to compare it with the dashed line, and not with other bars. Points of nearly the same size are moved sideways, so that bars can be told apart.
    """
    full = next(row for row in rows if row.arm == FULL)
    arms = sorted((row for row in rows if row.arm != FULL), key=lambda row: (row.kept_bytes, row.score))
    contracts = list(
        dict.fromkeys(row.arm.rpartition("@")[0] or row.arm for row in sorted(arms, key=lambda r: -r.score))
    )
    unit, name = (1e9, "GB") if full.full_bytes >= 1e9 else (1e6, "MB") if full.full_bytes >= 1e6 else (1e3, "kB")
    right = max(row.kept_bytes for row in rows) / unit * 1.04
    shown = spread([row.kept_bytes / unit for row in arms], 0.016 * right)
    with drawing(6.0, 3.7) as figure:
        axes = figure.add_subplot()
        axes.axhline(full.score, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        ends: list[tuple[str, float, float, str]] = [(FULL, full.kept_bytes / unit, full.score, INK)]
        axes.plot([full.kept_bytes / unit], [full.score], marker="o", color=INK, markersize=6, linestyle="none")
        for rank, contract in enumerate(contracts):
            colour, marker = SERIES[rank % len(SERIES)], MARKERS[rank % len(MARKERS)]
            points = [
                (x, row)
                for x, row in zip(shown, arms, strict=True)
                if (row.arm.rpartition("@")[0] or row.arm) == contract
            ]
            axes.plot(
                [x for x, _ in points],
                [row.score for _, row in points],
                color=colour,
                linewidth=1,
                marker=marker,
                markersize=5,
            )
            for x, row in points:
                if row.ci_low is not None and row.ci_high is not None:
                    ends_of_bar = [max(0.0, full.score + row.ci_low), min(100.0, full.score + row.ci_high)]
                    axes.plot([x, x], ends_of_bar, color=colour, linewidth=1.6, alpha=0.75, solid_capstyle="butt")
            x, row = points[-1]
            ends.append((contract, x, row.score, colour))
        _frame(axes, right, name, rows)
        _name(axes, ends, right)
        return to_svg(figure, label)


def _frame(axes: Axes, right: float, unit: str, rows: Sequence[MacroRow]) -> None:
    lows = [row.full_score + row.ci_low for row in rows if row.ci_low is not None] + [row.score for row in rows]
    highs = [row.full_score + row.ci_high for row in rows if row.ci_high is not None] + [row.score for row in rows]
    low, high = max(0.0, min(lows)), min(100.0, max(highs))
    room = 0.06 * max(high - low, 5.0)
    axes.set(xlim=(0, right), ylim=(low - room, high + room), xlabel=f"cache, {unit}, measured", ylabel="score, points")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _name(axes: Axes, ends: list[tuple[str, float, float, str]], right: float) -> None:
    """Names at the right edge, each with a thin line to its point."""
    low, high = axes.get_ylim()
    heights = spread([y for _, _, y, _ in ends], 0.062 * (high - low))
    for (name, x, y, colour), height in zip(ends, heights, strict=True):
        axes.plot([x, right, right * 1.02], [y, y, height], color=LINE, linewidth=0.6, clip_on=False, zorder=0.5)
        axes.text(right * 1.03, height, _cut(name), color=colour if name != FULL else INK, va="center", fontsize=9)
    axes.xaxis.label.set_color(MUTED)


def _cut(name: str, characters: int = 22) -> str:
    return name if len(name) <= characters else name[: characters - 1] + "…"
