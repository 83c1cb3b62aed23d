"""Plots as SVG that lives inside a page: its texts are texts, and its colours follow the page's light or dark mode."""

from kvpress_eval.report.plots.forest import forest
from kvpress_eval.report.plots.heatmap import heatmap
from kvpress_eval.report.plots.score_by_bytes import score_by_bytes

__all__ = ["forest", "heatmap", "score_by_bytes"]
