"""Plots of a diagnostic as SVG that lives inside the page, in the style of an evaluation's (`kvpress_eval.report.plots`)."""

from kvpress_eval.diagnostic.report.plots.coupling import coupling
from kvpress_eval.diagnostic.report.plots.ladder import ladder
from kvpress_eval.diagnostic.report.plots.layers import layers
from kvpress_eval.diagnostic.report.plots.margins import margins
from kvpress_eval.diagnostic.report.plots.trajectories import trajectories
from kvpress_eval.diagnostic.report.plots.verdicts import verdicts

__all__ = ["coupling", "ladder", "layers", "margins", "trajectories", "verdicts"]
