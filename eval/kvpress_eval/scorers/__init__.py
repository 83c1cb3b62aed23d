"""Metrics of the benchmarks, each as its benchmark defines it; a deviation is another metric with a name of its own.

Every module of this package registers its metrics when it is imported; adding a metric is adding a file.
"""

from kvpress_eval.plugins import import_modules
from kvpress_eval.scorers.base import SCORERS, Score, Scorer, find_scorer, scorer

__all__ = ["SCORERS", "Score", "Scorer", "find_scorer", "scorer"]

import_modules(__name__, __path__)
