"""Rows of tokens in poisoned pages, and a copy of every byte to which a test applies what an operation should do.

Every byte that holds no token is 0xFF: NaN in every float dtype, in the scales of codes too. Entries of the page table that no token needs lead
to memory that cannot be read. An operation is right if, afterwards, all bytes of all slabs equal the copy's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress_kernels.pages import PageLayout, Pages
from kvpress_kernels.reference.int8 import dequantise, quantise

#: 16 TiB away from the anchor: nothing is mapped there
NOWHERE = 1 << 40


@dataclass(frozen=True)
class Token:
    """Views of the bytes of one slot: key [Dk], value [Dv], position [1] int32, scales [2] float16, or [0] without codes."""

    key: Tensor
    value: Tensor
    position: Tensor
    scales: Tensor

    def store(self, key: Tensor, value: Tensor, position: int) -> None:
        """Make it the token with this key and value."""
        for side, (part, vector) in enumerate(((self.key, key), (self.value, value))):
            if part.dtype == torch.int8:
                vector, scale = quantise(vector)
                self.scales[side] = scale
            part.copy_(vector)
        self.position.fill_(position)

    def copy_(self, other: Token) -> None:
        """Make every byte that of another token."""
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.copy_(theirs)

    def numbers(self) -> tuple[Tensor, Tensor]:
        """Key and value in float64."""
        if not self.scales.numel():
            return self.key.double(), self.value.double()
        key_scale, value_scale = self.scales
        return dequantise(self.key, key_scale, torch.float64), dequantise(self.value, value_scale, torch.float64)


class Image:
    """A copy of all slabs of some pages; tokens in it are found by the definition of a page, byte by byte."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.slabs = [(slab.data_ptr(), slab.flatten().clone()) for slab in pages.slabs]

    def token(self, entry: int, slot: int) -> Token:
        """The token in slot `slot` of the page with this entry."""
        layout, address = self.pages.layout, self.pages.anchor.data_ptr() + 16 * entry
        raw = next(raw for first, raw in self.slabs if first <= address < first + raw.numel())
        start = address - next(first for first, other in self.slabs if other is raw)
        key_bytes, value_bytes = (dim * layout.dtype.itemsize for dim in (layout.key_dim, layout.value_dim))
        values = -(-layout.page_size * key_bytes // 16) * 16
        scales = values + -(-layout.page_size * value_bytes // 16) * 16
        scale_bytes = 4 if layout.dtype == torch.int8 else 0
        positions = scales + -(-layout.page_size * scale_bytes // 16) * 16

        def part(offset: int, nbytes: int, dtype: torch.dtype) -> Tensor:
            at = start + offset + slot * nbytes
            return raw[at : at + nbytes].view(dtype)

        return Token(
            part(0, key_bytes, layout.dtype),
            part(values, value_bytes, layout.dtype),
            part(positions, 4, torch.int32),
            part(scales, scale_bytes, torch.float16),
        )

    def assert_equals_pages(self) -> None:
        """Every byte of every slab is as in this copy."""
        for (address, expected), slab in zip(self.slabs, self.pages.slabs, strict=True):
            assert address == slab.data_ptr()
            wrong = (expected != slab.flatten()).nonzero().flatten()
            assert not wrong.numel(), f"{wrong.numel()} bytes differ, the first is byte {int(wrong[0])} of its slab"


class Rows:
    """Rows of tokens with random contents, in a random order of pages that come from three slabs.

    lengths: stored tokens of each row. reserved: tokens for which the page table names pages, lengths by default.
    positions: of each row's tokens; ascending with random gaps by default.
    """

    def __init__(
        self,
        lengths: list[int],
        layout: PageLayout,
        *,
        reserved: list[int] | None = None,
        positions: list[list[int]] | None = None,
        seed: int = 0,
    ) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.layout, size = layout, layout.page_size
        self.pages = Pages(layout, "cpu")
        needed = [-(-n // size) for n in (lengths if reserved is None else reserved)]
        spare = 3  # pages that belong to nobody
        parts = [sum(needed) // 3 + 1, sum(needed) // 3 + 1, sum(needed) - 2 * (sum(needed) // 3) + spare - 2]
        entries = torch.cat([self.pages.add_slab(n) for n in parts])
        for slab in self.pages.slabs:
            slab.fill_(0xFF)
        order = iter(entries[torch.randperm(len(entries), generator=self.draw)].tolist())
        width = max(needed, default=0) + 1
        table = [[next(order) for _ in range(n)] + [NOWHERE] * (width - n) for n in needed]
        self.table = torch.tensor(table, dtype=torch.int64).reshape(len(lengths), width)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        stored = Image(self.pages)
        for row, length in enumerate(lengths):
            gaps = torch.randint(1, 4, (length,), generator=self.draw)
            places = (gaps.cumsum(0) - 1).tolist() if positions is None else positions[row]
            for slot in range(length):
                key, value = self.normal(layout.key_dim), self.normal(layout.value_dim)
                self.token(stored, row, slot).store(key, value, places[slot])
        for (_, raw), slab in zip(stored.slabs, self.pages.slabs, strict=True):
            slab.copy_(raw.view_as(slab))

    def token(self, image: Image, row: int, slot: int) -> Token:
        """Slot `slot` of a row, counted over its pages."""
        page, place = divmod(slot, self.layout.page_size)
        return image.token(int(self.table[row, page]), place)

    def image(self) -> Image:
        """A copy of all bytes as they are now."""
        return Image(self.pages)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random numbers that follow this object's seed."""
        return torch.randn(*shape, generator=self.draw).to(dtype)
