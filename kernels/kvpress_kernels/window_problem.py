"""What the passes of `window_scores` and `cumulative_mass` share: their operands, logits and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kvpress_kernels.launch import INTERPRETED, LOG2E, padded
from kvpress_kernels.softcap import tanh


@dataclass(frozen=True)
class Problem:
    """What all passes read: queries [S, G, Q, Dk], keys [S, N, Dk], values [S, N, Dv] (any strides, last one 1).

    visible [Q] int32: query q sees the first visible[q] tokens, 0 where its weight is 0. sinks [S, G] float32 logits.
    centre [S, Dv] float32 is subtracted from the values, so that differences of values keep their digits.
    """

    query: Tensor
    keys: Tensor
    values: Tensor | None
    centre: Tensor | None
    visible: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None

    @property
    def n_rows(self) -> int:
        return self.query.shape[1] * self.query.shape[2]

    @property
    def value_dim(self) -> int:
        return 0 if self.values is None else self.values.shape[2]

    def logit_factors(self) -> tuple[float, float]:
        """(scale, ceiling) as `logits_log2` takes them."""
        if self.softcap is None:
            return self.scale * LOG2E, 0.0
        return self.scale / self.softcap, self.softcap * LOG2E

    def dims(self) -> dict[str, Any]:
        """Constants that every pass takes."""
        return {
            "KEY_DIM": self.query.shape[3],
            "KEY_DIM_PADDED": padded(self.query.shape[3]),
            "VALUE_DIM": self.value_dim,
            "VALUE_DIM_PADDED": padded(max(self.value_dim, 1)),
            "SOFTCAP": self.softcap is not None,
            "UPCAST": INTERPRETED,
        }

    def strides(self) -> tuple[int, ...]:
        """Strides of queries (head, group, query), keys (head, token) and values (head, token)."""
        values = (0, 0) if self.values is None else self.values.stride()[:2]
        return (*self.query.stride()[:3], *self.keys.stride()[:2], *values)


@triton.jit
def logits_log2(products, scale, ceiling, SOFTCAP: tl.constexpr):
    """Logits in powers of two: products * scale, or ceiling * tanh(products * scale)."""
    logits = products * scale
    if SOFTCAP:
        logits = ceiling * tanh(logits)
    return logits


def device_class(arch: str) -> str:
    """What bounds the tiles: "hopper" (wgmma, 227 KB of shared memory), "large" (163 KB), "small" (99 KB), "amd" (64 KB)."""
    if arch == "interpreter":
        return arch
    if arch.startswith("gfx"):
        return "amd"
    return {"sm_80": "large", "sm_90": "hopper", "sm_100": "large", "sm_103": "large"}.get(arch, "small")


TYPES = {
    "VISIBLE": "*i32", "LARGEST": "*fp32", "TOTAL": "*fp32", "scale": "fp32", "ceiling": "fp32",
    "n_queries": "i32",
    **dict.fromkeys(("query_head", "query_group", "query_token", "key_head", "key_token"), "i32"),
}  # fmt: skip
#: strides of rows of 16 elements and more: what makes loads 16 bytes wide
ALIGNED = frozenset(("query_head", "query_group", "query_token", "key_head", "key_token", "value_head", "value_token"))


def shared_types(dtype: str, values: bool) -> dict[str, str]:
    """Types of the arguments that both passes share; without values those are None or 0."""
    types = {**TYPES, "QUERY": f"*{dtype}", "KEYS": f"*{dtype}", "value_head": "i32", "value_token": "i32"}
    return {**types, "VALUES": f"*{dtype}", "CENTRE": "*fp32"} if values else types


def shared_constants(dim: int, values: bool, softcap: bool) -> dict[str, Any]:
    """Constants that both passes share, for keys and values of one dim."""
    absent: dict[str, Any] = {} if values else {"VALUES": None, "CENTRE": None}
    return {
        **absent, "KEY_DIM": dim, "KEY_DIM_PADDED": padded(dim), "VALUE_DIM": dim if values else 0,
        "VALUE_DIM_PADDED": padded(dim if values else 1), "SOFTCAP": softcap, "UPCAST": False,
    }  # fmt: skip


def optional(types: dict[str, str], constants: dict[str, Any], present: bool, kind: str, *names: str) -> None:
    """Enter arguments that are None where they are not `present`."""
    if present:
        types.update(dict.fromkeys(names, kind))
    else:
        constants.update(dict.fromkeys(names))
