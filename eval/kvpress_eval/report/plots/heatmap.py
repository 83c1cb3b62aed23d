"""Scores by depth and length. With one length only, the columns are arms, so that these can be compared at a glance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvpress_eval.report.depths import DepthGrid
from kvpress_eval.report.plots.drawing import INK, drawing, to_svg

_COLOURS = colormaps["viridis"]
_PANELS = 4
Cells = dict[tuple[int, int], float]


def heatmap(grids: Sequence[DepthGrid], label: str) -> str:
    """Grids of one task and mode, in the order of their panels or columns."""
    lengths = sorted({length for grid in grids for length, _ in grid.scores})
    depths = sorted({depth for grid in grids for _, depth in grid.scores})
    rows = [f"{depth:g} %" for depth in depths]
    if len(lengths) == 1:
        with drawing(1.2 + 0.62 * len(grids), 1.3 + 0.26 * len(depths)) as figure:
            cells = {
                (column, line): grid.scores[lengths[0], depth]
                for column, grid in enumerate(grids)
                for line, depth in enumerate(depths)
                if (lengths[0], depth) in grid.scores
            }
            axes = figure.add_subplot()
            _draw(axes, cells, [grid.arm for grid in grids], rows, turned=True)
            axes.set_ylabel("depth in the context")
            return to_svg(figure, label)
    columns = min(_PANELS, len(grids))
    lines = math.ceil(len(grids) / columns)
    with drawing(0.7 + columns * (0.5 + 0.5 * len(lengths)), lines * (0.8 + 0.24 * len(depths))) as figure:
        _panels(figure, grids, lengths, depths, rows, (lines, columns))
        return to_svg(figure, label)


def _panels(
    figure: Figure,
    grids: Sequence[DepthGrid],
    lengths: list[int],
    depths: list[float],
    rows: list[str],
    shape: tuple[int, int],
) -> None:
    panels = list(figure.subplots(*shape, sharey=True, squeeze=False).flat)
    for axes, grid in zip(panels, grids, strict=False):
        cells = {
            (column, line): grid.scores[length, depth]
            for column, length in enumerate(lengths)
            for line, depth in enumerate(depths)
            if (length, depth) in grid.scores
        }
        _draw(axes, cells, [f"{length:,}" for length in lengths], rows)
        axes.set_title(grid.arm, loc="left", fontsize=9, color=INK)
    for axes in panels[len(grids) :]:
        axes.set_visible(False)


def _draw(axes: Axes, cells: Cells, columns: list[str], rows: list[str], *, turned: bool = False) -> None:
    """One rectangle for each cell, rather than an image: an image would be pixels in a page of text."""
    from matplotlib.patches import Rectangle

    for (column, line), score in cells.items():
        colour = _COLOURS(score / 100)
        axes.add_patch(Rectangle((column - 0.48, line - 0.48), 0.96, 0.96, color=colour, linewidth=0))
        bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 0.5
        axes.text(
            column, line, f"{score:.0f}", ha="center", va="center", fontsize=8, color="#111111" if bright else "#f4f4f4"
        )
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    turn: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if turned else {}
    axes.set_xticks(range(len(columns)), columns, fontsize=8.5, **turn)
    axes.set_yticks(range(len(rows)), rows, fontsize=8.5)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
