"""Stored tokens to check kernels on: scattered pages, and poison in everything that must not be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress_kernels.check.cases import SkippedError
from kvpress_kernels.pages import PageLayout, Pages, PageViews

#: elements by which far pages are apart
FAR_ELEMENTS = 1 << 31


@dataclass(frozen=True)
class Size:
    """How large the cases are: FULL on a device, SMALL in the interpreter, where a tile takes milliseconds."""

    name: str
    dims: tuple[int, ...]  # head dimensions; the first one stands for the rest where one will do
    page_sizes: tuple[int, ...]  # the default one first
    groups: tuple[int, ...]  # query heads per KV head, as above
    n_kv_heads: int
    dtypes: tuple[torch.dtype, ...]
    scale: int  # lengths of long rows

    def lengths(self, page_size: int) -> list[int]:
        """Tokens of each row: empty, at the bounds of a page, and longer ones; a multiple of n_kv_heads rows."""
        edges = [0, 1, page_size - 1, page_size, page_size + 1, 2 * page_size - 1]
        if self.scale == 1:
            return [0, page_size + 1, page_size - 1, 1]
        longer = [3, 500, 1000, 4097, 64 * page_size, 8 * page_size]
        return [*edges, *longer]


FULL = Size(
    "full", (128, 64, 80, 96, 192, 256), (32, 16, 64), (4, 1, 3, 7, 8), 4,
    (torch.bfloat16, torch.float16, torch.float32), 2,
)  # fmt: skip
SMALL = Size("small", (24,), (16,), (3,), 2, (torch.float32, torch.bfloat16), 1)


@dataclass(frozen=True)
class Stored:
    """R rows of stored tokens. room: pages are named for this many tokens behind each row's length."""

    pages: Pages
    page_table: Tensor  # [R, M] int64
    lengths: Tensor  # [R] int32
    counts: list[int]

    @property
    def rows(self) -> int:
        return len(self.counts)

    @property
    def n_columns(self) -> int:
        return self.page_table.shape[1]

    def slots(self, lengths: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Row and index in its row of every token, [total] each, on the device."""
        counts = torch.tensor(self.counts if lengths is None else list(lengths))
        row = torch.arange(len(counts)).repeat_interleave(counts)
        index = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
        return row.to(self.pages.device), index.to(self.pages.device)

    def read(self, lengths: Sequence[int] | None = None) -> PageViews:
        """Keys [total, Dk], values [total, Dv] and positions [total] of all tokens, row after row."""
        row, index = self.slots(lengths)
        size = self.pages.layout.page_size
        found = self.pages.read(self.page_table[row, index // size])
        token = torch.arange(len(row), device=row.device)
        return PageViews(*(part[token, index % size] for part in found))


def stored(
    device: torch.device,
    layout: PageLayout,
    counts: Sequence[int],
    *,
    seed: int = 0,
    room: int = 0,
    key_size: float = 1.0,
    far: bool = False,
    anchor: Tensor | None = None,
) -> Stored:
    """Random tokens in pages of two slabs, in random order; all else of the slabs is NaN.

    key_size: standard deviation of the keys. far: some pages are more than 2^31 elements from others. anchor: that the
    pages count from, their own by default.
    The same seed gives the same tokens on every machine. Unused entries of the page table name a page of NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    size = layout.page_size
    needed = [-(-(count + room) // size) for count in counts]
    pages, total = Pages(layout, device, anchor), sum(needed)
    if far:
        entries = _far_entries(pages, total + 1)
    else:
        halves = [pages.add_slab(total // 2 + 1), pages.add_slab(total - total // 2)]
        entries = torch.cat(halves)
    for slab in pages.slabs:
        slab.fill_(0xFF)  # a NaN in every float dtype
    order = entries[torch.randperm(len(entries), generator=generator)]
    poison = order[-1:]
    page_table = poison.repeat(len(counts), max(max(needed, default=0), 1))
    start = 0
    for row, n_pages in enumerate(needed):
        page_table[row, :n_pages] = order[start : start + n_pages]
        start += n_pages
    held = Stored(pages, page_table.to(device), torch.tensor(counts, dtype=torch.int32, device=device), list(counts))
    of_row, index = held.slots()
    keys = key_size * torch.randn(len(of_row), layout.key_dim, generator=generator)
    values = torch.randn(len(of_row), layout.value_dim, generator=generator) + 0.5
    gaps = torch.randint(1, 3, (len(of_row),), generator=generator)
    positions = ascending(gaps.to(device), of_row)
    pages.write(held.page_table[of_row, index // size], index % size, keys.to(device), values.to(device), positions)
    return held


def ascending(gaps: Tensor, row: Tensor) -> Tensor:
    """Positions [total] that grow by `gaps` within each row and start near zero."""
    sums = gaps.cumsum(0)
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    before = torch.where(first, sums - gaps, 0).cummax(0).values
    return sums - before - 1


def _far_entries(pages: Pages, n: int) -> Tensor:
    """Entries of n pages from both ends of a slab of more than FAR_ELEMENTS elements."""
    layout = pages.layout
    wanted = FAR_ELEMENTS * layout.dtype.itemsize // layout.nbytes + n + 1
    if pages.device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(pages.device)
        if free < 1.2 * wanted * layout.nbytes:
            raise SkippedError(f"needs {wanted * layout.nbytes / 1e9:.1f} GB of pages, {free / 1e9:.1f} GB are free")
    entries = pages.add_slab(wanted)
    return torch.cat([entries[: n // 2], entries[len(entries) - (n - n // 2) :]])


def normal(shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, seed: int, size: float = 1.0) -> Tensor:
    """Normal numbers, the same on every machine."""
    return (size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype).to(device)
