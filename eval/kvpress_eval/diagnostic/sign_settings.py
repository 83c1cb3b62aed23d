"""How signs are evaluated: every choice with its default and the reason for it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class SignSettings(BaseModel):
    """Choices of `signs.evaluate`.

    repeats: random splits of each cell. The numbers are means over splits. With 96 cells, another seed moves the rate
        gap by 0.6 points (sd) at 100 and by 0.9 at 50, beside a standard error of 4.5.
    min_clusters: cells with fewer clusters of samples are left out. With four, each half has two; below that the sign
        of a margin is that of a single sample.
    tolerance: points; a margin or delta this small or smaller is a tie. It absorbs rounding and nothing else: scores
        are means of ratios of small whole numbers, and two that differ do so by far more.
    thresholds: points; the gaps are shown again for cells with |m| of at least this, at the values of arXiv 2605.08234
        section 4 and Table 12.
    low_coupling: phi below it is low (arXiv 2605.08234 section 4).
    confidence: of all intervals.
    n_permutations: of the label permutation; the smallest p it can give is 1 / (n + 1).
    n_studies: simulated studies without effect, for the size of the artefact. 200 give its mean to a fourteenth of the
        standard deviation of single studies; 0 leaves the simulation out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    repeats: int = Field(default=100, ge=1)
    min_clusters: int = Field(default=4, ge=2)
    tolerance: float = Field(default=1e-6, ge=0)
    thresholds: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5)
    low_coupling: float = Field(default=0.10, gt=0, lt=1)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    n_permutations: int = Field(default=2_000, ge=1)
    n_studies: int = Field(default=200, ge=0)
