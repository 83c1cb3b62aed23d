"""A KV cache that is really smaller, for Hugging Face causal language models.

import kvpress
model, tokenizer = kvpress.load("Qwen/Qwen2.5-0.5B-Instruct")
with kvpress.compress(model, "snapkv", budget=0.25) as session:
    out = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=64)
print(session.report())
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvpress._guard import refuse_namesake

refuse_namesake()

if TYPE_CHECKING:
    from kvpress.backend import BackendRequest
    from kvpress.cache import CompressedCache
    from kvpress.contract import Contract, differences, preset_names
    from kvpress.errors import KvpressError
    from kvpress.loading import load
    from kvpress.session import Session, compress

__version__ = "0.1.0"
__all__ = [
    "BackendRequest",
    "CompressedCache",
    "Contract",
    "KvpressError",
    "Session",
    "compress",
    "differences",
    "load",
    "preset_names",
]

# loaded on first use: `import kvpress` and `kvpress --help` must not wait for torch and transformers
_HOMES = {
    "BackendRequest": "kvpress.backend",
    "CompressedCache": "kvpress.cache",
    "Contract": "kvpress.contract",
    "differences": "kvpress.contract",
    "preset_names": "kvpress.contract",
    "KvpressError": "kvpress.errors",
    "load": "kvpress.loading",
    "Session": "kvpress.session",
    "compress": "kvpress.session",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'kvpress' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
