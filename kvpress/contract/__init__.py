"""Contracts: what a selector is, as data."""

from kvpress.contract.contract import SLOTS, Contract, differences
from kvpress.contract.presets import preset_names, read_yaml, resolve

__all__ = ["SLOTS", "Contract", "differences", "preset_names", "read_yaml", "resolve"]
