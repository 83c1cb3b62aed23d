"""The compressed cache: one object per batch, one layer object per attention layer, one store per layer."""

from kvpress.cache.cache import CompressedCache

__all__ = ["CompressedCache"]
