"""The curve of a training as a picture: loss of the steps, and divergence on the judging text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvpress.matryoshka.training_state import Point


def draw_curve(points: Sequence[Point], path: Path, title: str) -> bool:
    """Write the curve to a file (.svg or .png); False where matplotlib is not installed (extra `train`)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [point for point in points if point.loss is not None]
    looks = [point for point in points if point.judge_kl is not None]
    left.plot([p.step for p in steps], [p.loss for p in steps], color="0.75", linewidth=1, label="each step")
    left.plot([p.step for p in steps], _smooth([p.loss or 0.0 for p in steps]), color="C0", label="mean of 20")
    left.set(xlabel="step", ylabel="training loss", title="ranks drawn anew for every window")
    left.legend(frameon=False)
    right.plot([p.step for p in looks], [p.judge_kl for p in looks], marker=".", color="C1")
    right.set(
        xlabel="step", ylabel="KL(full || projected), nats a token", title="text that is not trained on", ylim=(0, None)
    )
    figure.suptitle(title)
    figure.savefig(path)
    return True


def _smooth(values: Sequence[float], width: int = 20) -> list[float]:
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]
