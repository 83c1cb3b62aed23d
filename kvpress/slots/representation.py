"""Slot `representation`: how a kept token is stored.

Only the model's own dtype exists so far; orthogonal projections and integer storage plug in here and in the store.
"""

from __future__ import annotations

from typing import ClassVar

from kvpress.slots.base import Choice


class Representation(Choice, slot="representation"):
    """Base of the storage formats."""


class ModelDtype(Representation, kind="model"):
    """Keys (after RoPE) and values in the dtype in which the model computes them."""

    source: ClassVar[str] = "the model"
