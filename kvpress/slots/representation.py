"""Slot `representation`: how a kept token is stored.

Evidence at the end of the prompt is computed from the exact keys and values, which are all there then; so two contracts that differ in
this slot alone keep the same tokens of the prompt. Later decisions read what is stored.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from kvpress.slots.base import Choice


class Representation(Choice, slot="representation"):
    """Base of the storage formats."""

    @property
    def in_int8(self) -> bool:
        """Whether numbers are stored in eight bits with a scale for each vector."""
        return False

    @property
    def stored_dtype(self) -> str | None:
        """The dtype of stored numbers, None for the model's own."""
        return None


#: dtypes in which numbers can be stored, whatever the model computes in
StoredDtype = Literal["bfloat16", "float16"]


class ModelDtype(Representation, kind="model"):
    """Keys (after RoPE) and values as they are. dtype: a smaller one, which is widened when it is read."""

    source: ClassVar[str] = "the model"
    dtype: StoredDtype | None = None

    @property
    def stored_dtype(self) -> str | None:
        return self.dtype


class Int8(Representation, kind="int8"):
    """Keys and values in eight bits: one scale per token, KV head and side, symmetric."""

    source: ClassVar[str] = (
        "per-token symmetric quantisation, the usual baseline (for example arXiv 2402.02750 section 2)"
    )

    @property
    def in_int8(self) -> bool:
        return True


class Orthogonal(Representation, kind="orthogonal"):
    """Keys and values in the leading dimensions of orthogonal bases, one per layer, KV head and side.

    file: of a projection (`kvpress train projections`), relative to the working directory. share: of the native bytes of keys and values.
    ranks: the same share everywhere, or those that a search has written to the file for this share. int8: store what is left in eight
    bits; dtype: else in which dtype. sha256: of the file; filled in when the contract is resolved, and checked when it is used.
    """

    source: ClassVar[str] = "arXiv 2410.14731 (MatryoshkaKV)"
    file: str = Field(min_length=1)
    share: float = Field(default=0.5, gt=0, le=1)
    ranks: Literal["uniform", "searched"] = "uniform"
    int8: bool = False
    dtype: StoredDtype | None = None
    sha256: str = ""

    @property
    def in_int8(self) -> bool:
        return self.int8

    @property
    def stored_dtype(self) -> str | None:
        return self.dtype

    def identity(self) -> dict[str, Any]:
        """Without the path, where the content is known: the same file elsewhere is the same choice."""
        fields = super().identity()
        if self.sha256:
            del fields["file"]
        return fields
