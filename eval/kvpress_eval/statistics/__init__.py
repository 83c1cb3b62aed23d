"""Statistics of paired scores: intervals, tests, verdicts and the noise floor.

Everything works on paired differences, arm minus full cache on the same samples, in shares of the score (0 to 1), and
treats the cluster, not the row, as what was drawn independently. Which interval is given when is decided in one place,
`interval.py`.
"""

from kvpress_eval.statistics.binary import mcnemar, tango, wilson
from kvpress_eval.statistics.bootstrap import Bootstrap
from kvpress_eval.statistics.equivalence import Verdict, verdict
from kvpress_eval.statistics.interval import Estimate, Interval
from kvpress_eval.statistics.macro import macro_estimate
from kvpress_eval.statistics.multiple import benjamini_hochberg, holm
from kvpress_eval.statistics.noise import NoiseFloor, noise_floor, within_noise
from kvpress_eval.statistics.paired import Pairs, pair
from kvpress_eval.statistics.permutation import sign_flip
from kvpress_eval.statistics.retention import Retention, retention
from kvpress_eval.statistics.strata import Stratum

__all__ = [
    "Bootstrap",
    "Estimate",
    "Interval",
    "NoiseFloor",
    "Pairs",
    "Retention",
    "Stratum",
    "Verdict",
    "benjamini_hochberg",
    "holm",
    "macro_estimate",
    "mcnemar",
    "noise_floor",
    "pair",
    "retention",
    "sign_flip",
    "tango",
    "verdict",
    "wilson",
    "within_noise",
]
