"""The compressed cache: one object per batch, one layer object per attention layer, one store per layer."""

from kvpress.cache.cache import CompressedCache
from kvpress.cache.fan_out import FanOut, can_join, join, shares_prefill

__all__ = ["CompressedCache", "FanOut", "can_join", "join", "shares_prefill"]
