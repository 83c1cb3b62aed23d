"""Which kernels and which store a cache uses: the rule behind `backend="auto"`, and what it refuses.

backend    torch: plain torch, any device    triton: the kernels, CUDA and ROCm devices    auto: triton where it can
store      packed: flat buffers              paged: pages of one KV head                   auto: paged for triton
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from kvpress.errors import InputError, unknown
from kvpress_kernels.dispatch import BackendName, interpreted, why_no_kernels
from kvpress_kernels.pages import PageLayout

BACKENDS = ("auto", *get_args(BackendName))
STORES = ("auto", "packed", "paged")
PAGE_SIZES = (16, 32, 64)
DEFAULT_PAGE_SIZE = 32
#: the store that `auto` takes for each backend
AUTO_STORE = {"torch": "packed", "triton": "paged"}


@dataclass(frozen=True)
class Backend:
    """What serves a layer. reason: why `auto` chose it, for the report."""

    name: BackendName
    store: str
    page_size: int
    reason: str

    def layout(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> PageLayout | None:
        """Layout of the pages for keys and values of these widths; None for the packed store."""
        return None if self.store == "packed" else PageLayout(self.page_size, key_dim, value_dim, dtype)


@dataclass(frozen=True)
class BackendRequest:
    """What the user asked for; checked at construction.

    graphs: replay decode steps inside `generate` as CUDA graphs, where that is possible (kvpress/graphs.py).

    Raises:
        InputError: an unknown name or page size, or Triton with the packed store.
    """

    backend: str = "auto"
    store: str = "auto"
    page_size: int = DEFAULT_PAGE_SIZE
    graphs: bool = False

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InputError(unknown("backend", self.backend, BACKENDS))
        if self.store not in STORES:
            raise InputError(unknown("store", self.store, STORES))
        if self.page_size not in PAGE_SIZES:
            raise InputError(f"a page of {self.page_size} tokens is not served: use 16, 32 or 64")
        if self.backend == "triton" and self.store == "packed":
            raise InputError("the Triton kernels read pages: use store 'paged' (or 'auto') with backend 'triton'")
        if self.graphs and (self.backend == "torch" or self.store == "packed"):
            raise InputError("only the Triton kernels can be replayed as CUDA graphs: use backend 'auto' or 'triton'")

    def resolve(self, device: torch.device, dtype: torch.dtype, head_dims: tuple[int, ...]) -> Backend:
        """The backend for tensors of this kind.

        Raises:
            InputError: Triton was asked for by name and cannot serve them; `auto` takes torch then and says why.
        """
        obstacle = None if self.backend == "torch" else why_no_kernels(device, dtype, head_dims)
        if self.backend == "triton" and obstacle:
            raise InputError(f"backend 'triton' cannot be used: {obstacle}; use backend 'auto' or 'torch'")
        if self.backend != "auto":
            name, reason = self.backend, "asked for"
        elif self.store == "packed":
            name, reason = "torch", "the packed store has no kernels"
        elif obstacle or interpreted():
            name, reason = "torch", obstacle or "Triton runs in its interpreter, which is for tests"
        else:
            name, reason = "triton", f"device '{device}'"
        backend: BackendName = "triton" if name == "triton" else "torch"
        store = AUTO_STORE[backend] if self.store == "auto" else self.store
        return Backend(backend, store, self.page_size, reason)
