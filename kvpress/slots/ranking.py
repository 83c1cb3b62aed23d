"""Slot `ranking`: the scalar that orders the units of a KV head. This file: the base, and what needs attention only.

A ranking names the statistics that it reads (`statistics`); they come from one pass over the keys and values
(kvpress_kernels.reference.window_scores). It answers two questions: `exposure` is what the access slot debiases,
pools and reduces over heads; `weigh` is applied to the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny, field_validator
from torch import Tensor

from kvpress.slots.base import Choice

if TYPE_CHECKING:
    from kvpress.evidence import UnitFeatures


class Ranking(Choice, slot="ranking"):
    """Base. Higher scores are kept."""

    #: features of the stored tokens that need the layer's output projection
    needs_output_weight: ClassVar[bool] = False

    @property
    def statistics(self) -> frozenset[str]:
        """Names of the statistics of `window_scores` that `exposure` reads; empty: no query is looked at."""
        return frozenset()

    @property
    def space(self) -> Literal["value", "output"]:
        """The space in which output change is measured: the head's values, or the residual stream (after W_O)."""
        return "value"

    def exposure(self, statistics: dict[str, Tensor], features: UnitFeatures) -> Tensor:
        """[H, G, U] non-negative scores per query head, from [H, G, U] statistics."""
        raise NotImplementedError

    def weigh(self, pooled: Tensor | None, features: UnitFeatures) -> Tensor:
        """[H, U] final scores from the pooled exposures [H, U] (None when `statistics` is empty)."""
        assert pooled is not None
        return pooled

    def first_stage(self, pooled: Tensor | None) -> tuple[float, Tensor] | None:
        """A share of the budget that is filled by other scores [H, U] first, or None."""
        return None


class Mass(Ranking, kind="mass"):
    """Attention mass: sum_u r_u a_c(u). The host of the diagnostic paper."""

    source: ClassVar[str] = "arXiv 2404.14469 (SnapKV), 2306.14048 (H2O), 2401.06104 (TOVA)"

    @property
    def statistics(self) -> frozenset[str]:
        return frozenset({"mass"})

    def exposure(self, statistics: dict[str, Tensor], features: UnitFeatures) -> Tensor:
        return statistics["mass"]


class Additive(Ranking, kind="additive"):
    """Negative control: the mass plus terms that know nothing of the values, in units of standard deviations.

    score = z(a) + weight * (sum of z(T)). T_a, the access term, is the concentration sum r a^2; T_c, the contract
    term, is the coverage: the share of queries that give the unit more than uniform attention. The paper's own
    formulas of T_a and T_c are not disclosed; these keep its point, that no value enters.
    """

    source: ClassVar[str] = "arXiv 2605.08234 App. K.1 (Addi-a, Addi-c, Addi-a+c); formulas ours"
    terms: Literal["a", "c", "a+c"] = "a+c"
    weight: float = Field(default=0.5, ge=0)

    @property
    def statistics(self) -> frozenset[str]:
        extra = {"a": {"mass_squared"}, "c": {"coverage"}, "a+c": {"mass_squared", "coverage"}}
        return frozenset({"mass"} | extra[self.terms])

    def exposure(self, statistics: dict[str, Tensor], features: UnitFeatures) -> Tensor:
        valid = features.valid[:, None]
        count = valid.sum(-1, keepdim=True)

        def standard(term: Tensor) -> Tensor:
            offset = term - (term * valid).sum(-1, keepdim=True) / count
            spread = ((offset.square() * valid).sum(-1, keepdim=True) / count).sqrt()
            return offset / spread.clamp(min=torch.finfo(term.dtype).tiny)

        score = standard(statistics["mass"])
        for name in sorted(self.statistics - {"mass"}):
            score = score + self.weight * standard(statistics[name])
        # pooling and debiasing expect non-negative exposures; a shift does not change the order within a head
        lowest = score.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
        return (score - lowest) * valid


class Position(Ranking, kind="position"):
    """Newest first; with protected sinks this is StreamingLLM."""

    source: ClassVar[str] = "arXiv 2309.17453 (StreamingLLM)"

    def weigh(self, pooled: Tensor | None, features: UnitFeatures) -> Tensor:
        return features.starts.double()


class Random(Ranking, kind="random"):
    """Uniform noise that depends on the seed, the layer, the head and the unit's position, and on nothing else."""

    source: ClassVar[str] = "control"
    seed: int = Field(default=0, ge=0, lt=2**31)

    def weigh(self, pooled: Tensor | None, features: UnitFeatures) -> Tensor:
        return position_noise(features.starts, features.layer, self.seed)


def position_noise(starts: Tensor, layer: int, seed: int) -> Tensor:
    """Uniform noise in [0, 1) for units [H, U] at these positions: one stream per (seed, layer, head), so that a row gets
    the same noise alone and in a batch."""
    n_positions = int(starts.max()) + 1 if starts.numel() else 1
    rows = []
    for head in range(starts.shape[0]):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) * 1_009 + head)
        noise = torch.rand(n_positions, generator=generator, dtype=torch.float64)
        rows.append(noise.to(starts.device)[starts[head]])
    return torch.stack(rows)


class KeyNorm(Ranking, kind="key_norm"):
    """Minus the key's L2 norm: keys of small norm tend to attract attention."""

    source: ClassVar[str] = "arXiv 2406.11430"

    def weigh(self, pooled: Tensor | None, features: UnitFeatures) -> Tensor:
        return -features.key_norm()


class Jittered(Ranking, kind="jittered"):
    """Another ranking, its scores multiplied by 1 + epsilon * noise: the null arm of a diagnostic.

    It decides like the ranking it wraps but for ties and near ties, so what a comparison finds between the two is what
    the comparison finds where nothing is.
    """

    source: ClassVar[str] = "control (an A/A arm)"
    of: SerializeAsAny[Ranking] = Mass()
    epsilon: float = Field(default=1e-6, gt=0, le=1e-2)
    seed: int = Field(default=0, ge=0, lt=2**31)

    @field_validator("of", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Ranking:
        inner = Ranking.parse(value)
        if isinstance(inner, Jittered):
            raise ValueError("'jittered' wraps any other ranking, not itself")
        return inner

    @property
    def needs_output_weight(self) -> bool:  # type: ignore[override]
        return self.of.needs_output_weight

    @property
    def statistics(self) -> frozenset[str]:
        return self.of.statistics

    @property
    def space(self) -> Literal["value", "output"]:
        return self.of.space

    def exposure(self, statistics: dict[str, Tensor], features: UnitFeatures) -> Tensor:
        return self.of.exposure(statistics, features)

    def weigh(self, pooled: Tensor | None, features: UnitFeatures) -> Tensor:
        scores = self.of.weigh(pooled, features)
        return scores * (1 + self.epsilon * position_noise(features.starts, features.layer, self.seed).to(scores.dtype))

    def first_stage(self, pooled: Tensor | None) -> tuple[float, Tensor] | None:
        return self.of.first_stage(pooled)
