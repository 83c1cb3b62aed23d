"""Shapes that are measured, and pages filled on the device: contents are random, places are shuffled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress_kernels.pages import PageLayout, Pages, n_pages, typed, typed_scales


@dataclass(frozen=True)
class Scale:
    """FULL on a device; TINY takes the same paths in the interpreter. tokens: a thousand of them, as it were."""

    n_kv_heads: int
    group: int
    dim: int
    dtype: torch.dtype
    k_tokens: int
    page_sizes: tuple[int, ...]  # the default one first
    batches: tuple[int, ...]
    contexts: tuple[int, ...]  # in k_tokens
    layers: int
    rotation: int  # bytes of inputs that pass before one is used again; an H100 caches 50 MB

    def layout(self, page_size: int | None = None, dtype: torch.dtype | None = None) -> PageLayout:
        return PageLayout(page_size or self.page_sizes[0], self.dim, self.dim, dtype or self.dtype)


#: a layer of Llama-3.1-8B
FULL = Scale(8, 4, 128, torch.bfloat16, 1024, (32, 16, 64), (1, 8, 32), (2, 8, 32), 32, 100 << 20)
TINY = Scale(2, 2, 16, torch.float32, 16, (16, 32), (1,), (1, 2), 2, 1)


@dataclass(frozen=True)
class Filled:
    """Rows of random tokens. slots: [R, M] index of each page in the slab."""

    pages: Pages
    page_table: Tensor
    lengths: Tensor
    slots: Tensor

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values [R, M * P, D] as contiguous tensors."""
        (slab,) = self.pages.slabs
        found = typed(slab, self.pages.layout)
        keys, values = (part[self.slots].flatten(1, 2) for part in found[:2])
        return keys, values


def filled(
    device: torch.device,
    layout: PageLayout,
    counts: Sequence[int],
    seed: int,
    room: int = 0,
    anchor: Tensor | None = None,
) -> Filled:
    """Rows of `counts` tokens, in pages for `room` more, shuffled over one slab. anchor: that pages count from."""
    generator = torch.Generator(device).manual_seed(seed)
    lengths = torch.tensor(counts, dtype=torch.int32, device=device)
    needed = n_pages(lengths + room, layout.page_size)
    pages, total = Pages(layout, device, anchor), int(needed.sum())
    entries = pages.add_slab(total).to(device)
    views = typed(pages.slabs[0], layout)
    if layout.is_int8:
        typed_scales(pages.slabs[0], layout).fill_(0.02)
    for part in views[:2]:
        if layout.is_int8:
            part.random_(-127, 128, generator=generator)
        else:
            part.normal_(generator=generator)
    order = torch.randperm(total, generator=generator, device=device)
    column = torch.arange(int(needed.max()), device=device)
    used = column < needed[:, None]
    slots = torch.zeros_like(used, dtype=torch.int64)
    slots[used] = order
    # row by row, so that positions ascend within a row
    views.positions[slots[used]] = (column.expand_as(used)[used, None] * layout.page_size).to(
        torch.int32
    ) + torch.arange(layout.page_size, dtype=torch.int32, device=device)
    return Filled(pages, entries[slots], lengths, slots)


def normal(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Normal numbers, made on the device."""
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), dtype=dtype, device=device)
