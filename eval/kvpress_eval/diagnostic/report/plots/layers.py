"""Change of the attention output by layer, one panel for each model and budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.ticker import MaxNLocator

from kvpress_eval.diagnostic.report.means import Mean
from kvpress_eval.diagnostic.report.plots.panels import cut, lines_of, panels, width_of
from kvpress_eval.report.plots.drawing import LINE, MUTED, SERIES, drawing, to_svg

_COLUMNS = 3
#: arms that have colours of their own
MAX_ARMS = len(SERIES)


def layers(by_panel: Mapping[str, Mapping[str, Sequence[Mean]]], label: str) -> str:
    """by_panel: title -> name of the arm as it is shown -> one mean for each compressed layer, with its band."""
    names = list(dict.fromkeys(name for curves in by_panel.values() for name in curves))[:MAX_ARMS]
    n = len(by_panel)
    with drawing(width_of(n, _COLUMNS, 0.7), 0.6 + 2.2 * lines_of(n, _COLUMNS)) as figure:
        grid = panels(figure, list(by_panel), _COLUMNS, sharey=True)
        for axes, curves in zip(grid, by_panel.values(), strict=True):
            for rank, name in enumerate(names):
                curve = [one for one in curves.get(name, ()) if one.value is not None]
                values = [float(one.value) for one in curve if one.value is not None]
                places = range(1, len(values) + 1)
                axes.plot(places, values, color=SERIES[rank], linewidth=1.3, label=cut(name, 22))
                lows = [value if one.low is None else one.low for one, value in zip(curve, values, strict=True)]
                highs = [value if one.high is None else one.high for one, value in zip(curve, values, strict=True)]
                axes.fill_between(places, lows, highs, color=SERIES[rank], alpha=0.15, linewidth=0)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", color=LINE)
            axes.set_axisbelow(True)
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(labels)), frameon=False, fontsize=8.5)
        figure.supxlabel("compressed layer, from the first", color=MUTED, fontsize=9)
        figure.supylabel("|o_K − o| / |o|", color=MUTED, fontsize=9)
        return to_svg(figure, label)
