"""Slot `ranking`: scalars that look at the values, that is, at what removing a unit does to the output.

Notation of arXiv 2605.08234: a_c mass of unit c, g_c = s_c - a_c o its displacement of the output o.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvpress.slots.ranking import Mass, Ranking
from kvpress_kernels.reference.window_scores import MIN_REST, change

if TYPE_CHECKING:
    from kvpress.evidence import UnitFeatures


class OutputChange(Ranking):
    """sum_u r_u |g_c|^2 / (1 - a_c)^(2 alpha), the family of NoLev (alpha 0) and MII (alpha 1).

    `norm_space: output` measures |W_O g_c| in the residual stream instead of |g_c| in the head's value space, one query
    head at a time: cross terms between heads are left out.
    """

    norm_space: Literal["value", "output"] = "value"

    @property
    def exponent(self) -> float:
        """alpha."""
        raise NotImplementedError

    @property
    def statistics(self) -> frozenset[str]:
        return frozenset({"mass", change(self.exponent)})

    @property
    def space(self) -> Literal["value", "output"]:
        return self.norm_space

    def exposure(self, statistics: dict[str, Tensor], features: UnitFeatures) -> Tensor:
        return statistics[change(self.exponent)]


class NoLev(OutputChange, kind="nolev"):
    """sum_u r_u |g_c|^2: the output change without the leverage 1/(1 - a_c)^2."""

    source: ClassVar[str] = "arXiv 2605.08234 section 4 (NoLev)"

    @property
    def exponent(self) -> float:
        return 0.0


class MII(OutputChange, kind="mii"):
    """sum_u r_u |g_c|^2 / (1 - a_c)^2: the squared output change when unit c is left out and the rest renormalised."""

    source: ClassVar[str] = "arXiv 2605.08234 eq. 11"

    @property
    def exponent(self) -> float:
        return 1.0


class AlphaLeverage(OutputChange, kind="alpha_leverage"):
    """Leverage damped to the power alpha.

    The paper does not write its alpha blend out; this is the one-parameter family through both of its end points.
    """

    source: ClassVar[str] = "arXiv 2605.08234 App. K.3 (blend ours)"
    alpha: float = Field(default=0.5, ge=0, le=1)

    @property
    def exponent(self) -> float:
        return self.alpha


class VATP(Mass, kind="vatp"):
    """Mass times |v|_1."""

    source: ClassVar[str] = "arXiv 2406.12335 (VATP)"

    def weigh(self, pooled: Tensor | None, features: UnitFeatures) -> Tensor:
        assert pooled is not None
        return pooled * features.value_norm(1)


class CriticalKV(Mass, kind="criticalkv"):
    """Two stages: half of the budget by mass, the rest by (mass + epsilon) * mean over the group of |W_O v|_1."""

    source: ClassVar[str] = "arXiv 2502.03805 (CriticalKV), Algorithm 1"
    needs_output_weight: ClassVar[bool] = True
    first_stage_share: float = Field(default=0.5, ge=0, le=1)
    epsilon: float = Field(default=1e-4, ge=0)

    def weigh(self, pooled: Tensor | None, features: UnitFeatures) -> Tensor:
        assert pooled is not None
        return (pooled + self.epsilon) * features.output_norm(1).mean(1)

    def first_stage(self, pooled: Tensor | None) -> tuple[float, Tensor] | None:
        assert pooled is not None
        return self.first_stage_share, pooled


class CAOTE(Mass, kind="caote"):
    """alpha/(1 - alpha) * |o - v|_2 with alpha the pooled mass scaled to sum to 1, and o = sum alpha v.

    Scaling to sum 1 is the paper's rule for scores that are not one query's attention (its meta-eviction form).
    """

    source: ClassVar[str] = "arXiv 2504.14051 (CAOTE) eq. 6-8"

    def weigh(self, pooled: Tensor | None, features: UnitFeatures) -> Tensor:
        assert pooled is not None
        share = pooled / pooled.sum(-1, keepdim=True).clamp(min=torch.finfo(pooled.dtype).tiny)
        distance = features.distance_to_mean(share)
        return share / (1 - share).clamp(min=MIN_REST) * distance


class LaProx(Ranking, kind="laprox"):
    """|A[:, i]|_2 * |(V W_O)_i|_2 per query head, divided by the layer's sum so that layers can be compared."""

    source: ClassVar[str] = "arXiv 2605.07234 (LaProx)"
    needs_output_weight: ClassVar[bool] = True

    @property
    def statistics(self) -> frozenset[str]:
        return frozenset({"mass", "mass_squared"})

    def exposure(self, statistics: dict[str, Tensor], features: UnitFeatures) -> Tensor:
        return statistics["mass_squared"].sqrt() * features.output_norm(2)

    def weigh(self, pooled: Tensor | None, features: UnitFeatures) -> Tensor:
        assert pooled is not None
        return pooled / pooled.sum().clamp(min=torch.finfo(pooled.dtype).tiny)
