"""Attention kernels that others ship, for one new token over dense keys and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpress_kernels.bench.timing import Launch
from kvpress_kernels.launch import INTERPRETED


def decode(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Mapping[str, Launch | str]:
    """Launches by name, or the reason why there is none.

    query: [B, Hkv, G, D]; keys, values: [B, Hkv, n, D] contiguous. sdpa: torch's choice of kernel, told of the groups
    by `enable_gqa`; sdpa packed: the group as queries of one head; flex_attention: compiled; flash-attn: if installed.
    """
    batch, n_kv_heads, group, dim = query.shape
    heads = query.reshape(batch, n_kv_heads * group, 1, dim)
    found: dict[str, Launch | str] = {
        "sdpa": lambda: F.scaled_dot_product_attention(heads, keys, values, scale=scale, enable_gqa=True),
        "sdpa packed": lambda: F.scaled_dot_product_attention(query, keys, values, scale=scale),
    }
    if INTERPRETED:
        found["flex_attention"] = "the interpreter does not compile"
    else:
        found["flex_attention"] = lambda: _flex()(heads, keys, values, scale=scale, enable_gqa=True)
    try:
        flash_attn = import_module("flash_attn")
    except ImportError:
        found["flash-attn"] = "not installed"
        return found
    rows = query.reshape(batch, 1, n_kv_heads * group, dim)
    key_cache, value_cache = (part.transpose(1, 2).contiguous() for part in (keys, values))
    found["flash-attn"] = lambda: flash_attn.flash_attn_with_kvcache(rows, key_cache, value_cache, softmax_scale=scale)
    return found


@lru_cache(maxsize=1)
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
