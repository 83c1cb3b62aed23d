"""Slot `budget`: how much of the cache may stay."""

from __future__ import annotations

from decimal import Decimal
from typing import ClassVar, NamedTuple

from pydantic import Field

from kvpress.errors import ContractError
from kvpress.slots.base import Choice


class Unit(NamedTuple):
    """What one KV head stores together: a token, or a page of tokens.

    nbytes: its bytes, index included. may_stay_empty: tokens of a head's last unit that may be empty on average, where
    the heads' lengths are not known beforehand.
    """

    tokens: int
    nbytes: int
    may_stay_empty: int = 0


class Budget(Choice, slot="budget"):
    """Base: tokens per KV head that a sequence may keep, on average over layers and heads."""

    def tokens_per_head(self, n_tokens: int, n_heads_total: int, unit: Unit) -> int:
        """Kept tokens per KV head, protection included.

        Args:
            n_tokens: real (not padding) tokens of the prompt.
            n_heads_total: KV heads summed over the compressed layers.
            unit: what is stored together in one KV head, and its bytes.
        """
        raise NotImplementedError

    @property
    def short(self) -> str:
        """The short form that `parse_budget` reads."""
        raise NotImplementedError

    @property
    def keeps_everything(self) -> bool:
        """True when no prompt can lose a token under this budget."""
        return False


class Fraction(Budget, kind="fraction"):
    """A share b of the prompt: k = floor(b * n). The usual definition of a compression budget."""

    source: ClassVar[str] = "arXiv 2605.08234 section 2: k = floor(b T)"
    value: float = Field(gt=0, le=1)

    def tokens_per_head(self, n_tokens: int, n_heads_total: int, unit: Unit) -> int:
        # 1e-9 guards against 0.29 * 100 = 28.999999999999996
        return int(self.value * n_tokens + 1e-9)

    @property
    def short(self) -> str:
        return f"{(Decimal(str(self.value)) * 100).normalize():f}%"

    @property
    def keeps_everything(self) -> bool:
        return self.value == 1.0


class Tokens(Budget, kind="tokens"):
    """A fixed number of tokens per KV head, whatever the prompt's length."""

    source: ClassVar[str] = "arXiv 2404.14469 (SnapKV): max_capacity_prompt"
    value: int = Field(ge=1)

    def tokens_per_head(self, n_tokens: int, n_heads_total: int, unit: Unit) -> int:
        return min(self.value, n_tokens)

    @property
    def short(self) -> str:
        return f"{self.value}tokens"


class Bytes(Budget, kind="bytes"):
    """Bytes per sequence over all compressed layers and heads, the position index included.

    In pages every head fills its pages; where heads differ in length, as much as all may leave empty is kept free.
    """

    source: ClassVar[str] = "ours: comparisons are made at equal bytes"
    value: int = Field(ge=1)

    def tokens_per_head(self, n_tokens: int, n_heads_total: int, unit: Unit) -> int:
        tokens = self.value // (n_heads_total * unit.nbytes) * unit.tokens - unit.may_stay_empty
        if tokens < 1:
            what = "token" if unit.tokens == 1 else f"page of {unit.tokens} tokens"
            raise ContractError(
                f"a budget of {self.value:,} bytes holds nothing: one {what} in all {n_heads_total} KV heads "
                f"takes {n_heads_total * unit.nbytes:,} bytes; raise the budget"
            )
        return min(tokens, n_tokens)

    @property
    def short(self) -> str:
        return f"{(Decimal(self.value) / 10**6).normalize():f}MB"


def parse_budget(text: str | int | float) -> Budget:
    """A budget from a short form: 0.25 or "0.25" or "25%" (fraction), 512 or "512" or "512tokens", "20MB" or "20MiB" or "4096B"."""
    if isinstance(text, bool):
        raise ContractError(f"budget {text!r} is no number; use for example 0.25, 512tokens or 20MB")
    units = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "b": 1}
    form = str(text).strip().lower().replace(" ", "")
    if form.isdecimal() and int(form) > 1:
        return Tokens(value=int(form))
    try:
        if form.endswith("tokens"):
            return Budget.parse({"kind": "tokens", "value": int(form.removesuffix("tokens"))})
        if form.endswith("%"):
            return Budget.parse({"kind": "fraction", "value": float(Decimal(form[:-1]) / 100)})
        for unit, factor in sorted(units.items(), key=lambda item: -len(item[0])):
            if form.endswith(unit):
                amount = Decimal(form.removesuffix(unit)) * factor
                round(float(amount))  # refuses what no machine holds
                return Budget.parse({"kind": "bytes", "value": round(amount)})
        return Budget.parse({"kind": "fraction", "value": float(form)})
    except (ValueError, ArithmeticError):
        raise ContractError(
            f"budget '{text}' is not understood; use for example 0.25, 25%, 512tokens or 20MB"
        ) from None
