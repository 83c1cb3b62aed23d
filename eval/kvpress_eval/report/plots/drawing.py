"""From a matplotlib figure to SVG for a page.

Colours that depend on light or dark mode are drawn in placeholder colours and then replaced by CSS variables that the page
defines: --ink, --muted, --line, --good, --bad, --unsure and --series-1 to --series-8.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

_PLACEHOLDERS = {
    "#000001": "--ink",
    "#000002": "--muted",
    "#000003": "--line",
    "#000004": "--good",
    "#000005": "--bad",
    "#000006": "--unsure",
    **{f"#0000a{n}": f"--series-{n}" for n in range(1, 9)},
}
INK, MUTED, LINE, GOOD, BAD, UNSURE = list(_PLACEHOLDERS)[:6]
SERIES = tuple(list(_PLACEHOLDERS)[6:])
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from files: a dollar sign in one is no formula
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "figure.facecolor": "none",
}


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, with the page's style; it needs no display and leaves no global state behind."""
    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: Figure, label: str) -> str:
    """The figure as an <svg> element. label: what a screen reader says instead.

    The same figure gives the same text; ids depend on the label, since all figures share one page.
    """
    text = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": label}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would style the whole page
    svg = re.sub(r"\s*\n\s*", " ", svg)
    used = set(re.findall(r"#([\w-]+)[)\"]", svg))
    svg = re.sub(r' id="([\w-]+)"', lambda found: found[0] if found[1] in used else "", svg)
    for colour, variable in _PLACEHOLDERS.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"; font-family: [^;\"]+", "", svg)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size is not None
    width = round(float(size[1]) * 4 / 3)  # points to CSS pixels
    head = f'<svg role="img" aria-label="{escape(label)}" style="max-width: {width}px" viewBox="{size[0][9:-1]}">'
    return head + svg[svg.index(">") + 1 :].strip()


def spread(positions: list[float], gap: float) -> list[float]:
    """Positions moved as little as a simple pass can, so that neighbours keep `gap`; the order stays."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed: list[list[float]] = []  # groups of neighbours: wanted positions, each moved to its place in the group
    for index in order:
        placed.append([positions[index]])
        while len(placed) > 1 and _start(placed[-1], gap) < _start(placed[-2], gap) + len(placed[-2]) * gap:
            last = placed.pop()
            placed[-1] += last
    flat = [_start(group, gap) + rank * gap for group in placed for rank in range(len(group))]
    result = [0.0] * len(positions)
    for index, value in zip(order, flat, strict=True):
        result[index] = value
    return result


def _start(group: list[float], gap: float) -> float:
    return sum(group) / len(group) - (len(group) - 1) * gap / 2
