"""Prompt templates of the benchmarks: protocol constants, kept verbatim in YAML files that name their source."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import yaml


@cache
def load_prompts(name: str) -> dict[str, Any]:
    """Content of `prompts/<name>.yaml`. It is read once and shared, so callers must not change it."""
    text = resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content
