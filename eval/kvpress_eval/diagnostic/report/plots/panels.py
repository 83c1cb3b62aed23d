"""A grid of panels with one title each; what does not fill the last line is left empty."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvpress_eval.diagnostic.report.means import Mean
from kvpress_eval.report.plots.drawing import BAD, GOOD, INK, UNSURE

#: inches of a page that figures fill
_WIDTH = 10.4


def width_of(n: int, columns: int, beside: float) -> float:
    """Inches of a figure of n panels in lines of `columns`, with so many inches of labels beside them; few panels stay small."""
    columns = max(1, min(columns, n))
    return beside + columns * min(2.9, (_WIDTH - beside) / columns)


def lines_of(n: int, columns: int) -> int:
    """Lines of panels that n panels take."""
    return max(1, math.ceil(n / columns))


def panels(figure: Figure, titles: list[str], columns: int, **shared: Any) -> list[Axes]:
    """One axes for each title, in lines of `columns`."""
    columns = max(1, min(columns, len(titles)))
    axes = list(figure.subplots(lines_of(len(titles), columns), columns, squeeze=False, **shared).flat)
    for each, title in zip(axes, titles, strict=False):
        each.set_title(cut(title, 26), loc="left", fontsize=9, color=INK)
        each.tick_params(length=0)
    for place, each in enumerate(axes[len(titles) :], start=len(titles)):
        each.set_visible(False)
        axes[place - columns].tick_params(labelbottom=True)  # it is the last one of its column
    return axes[: len(titles)]


def cut(name: str, characters: int) -> str:
    return name if len(name) <= characters else name[: characters - 1] + "…"


def colour_of(change: Mean | None) -> str:
    """Of a difference: good or bad where its interval leaves out 0."""
    if change is None or not change.excludes_zero:
        return UNSURE
    return GOOD if (change.value or 0.0) > 0 else BAD
