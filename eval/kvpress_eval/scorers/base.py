"""The registry of metrics. A metric is one function of (prediction, sample), registered under its name.

@scorer("qa_f1", version="longbench-official")
def qa_f1(prediction: str, sample: Sample) -> Score: ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvpress.errors import InputError, unknown
from kvpress_eval.sample import Sample


@dataclass(frozen=True)
class Score:
    """value: in [0, 1]; parts: named partial scores in [0, 1], such as one for each needle depth."""

    value: float
    parts: dict[str, float] = field(default_factory=dict)


Metric = Callable[[str, Sample], Score]


@dataclass(frozen=True)
class Scorer:
    """A metric with the version that every record states. `version` names the definition it follows."""

    name: str
    version: str
    metric: Metric

    def __call__(self, prediction: str, sample: Sample) -> Score:
        return self.metric(prediction, sample)


SCORERS: dict[str, Scorer] = {}


def scorer(name: str, *, version: str) -> Callable[[Metric], Metric]:
    """Register a metric."""

    def register(metric: Metric) -> Metric:
        if name in SCORERS:
            raise ValueError(f"metric '{name}' is registered twice")
        SCORERS[name] = Scorer(name, version, metric)
        return metric

    return register


def find_scorer(name: str) -> Scorer:
    """The scorer of a metric name.

    Raises:
        InputError: there is none.
    """
    if name not in SCORERS:
        raise InputError(unknown("metric", name, SCORERS))
    return SCORERS[name]
