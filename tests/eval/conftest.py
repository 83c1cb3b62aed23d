"""Fixtures of the tests of kvpress_eval."""

from ruler_support import ruler_data

__all__ = ["ruler_data"]
