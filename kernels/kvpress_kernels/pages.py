"""Pages: fixed-size runs of tokens of one (row, KV head), and how kernels and torch find them.

A page is one run of bytes, so that one address finds all of it:

    keys [P, Dk] | values [P, Dv] | positions [P] int32                              each part starts at a
    keys [P, Dk] | values [P, Dv] | scales [P, 2] float16 | positions [P] int32      multiple of 16 bytes

The second form is that of int8 pages: keys and values are codes, and `scales` are what a token's key and value codes are
multiplied with. The two stand together, so that a token has one 32-bit word of them: the least that a load can copy ahead
without waiting, and what `compact` moves. They follow the codes, so that these lie in pages of every dtype alike.

Pages live in slabs, plain uint8 tensors that come from and go back to torch's allocator. A page table does not hold
the number of a page but its *entry*: the distance of its first byte from the anchor, a small tensor that lives as long
as the pages, in units of 16 bytes. So slabs may come and go while the tables of all other pages stay valid, a kernel
needs one pointer and one 64-bit load per page, and the unit tells the compiler that 16-byte loads are aligned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvpress_kernels.reference.int8 import SCALE_DTYPE, dequantise, quantise

#: bytes of one step of a page table entry
UNIT_BYTES = 16
#: pages are copied in pieces of this size
COPY_BYTES = 16 << 20
#: pages start on multiples of this within a slab, so that rows of keys do not straddle more memory sectors than needed
PAGE_ALIGNMENT = 64


@dataclass(frozen=True)
class PageLayout:
    """Shape of a page: `page_size` tokens of `key_dim` and `value_dim` numbers of `dtype`, and their positions.

    dtype: a float dtype, or torch.int8 for codes with a float16 scale for each key and value.
    """

    page_size: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def is_int8(self) -> bool:
        """Whether keys and values are codes with scales."""
        return self.dtype == torch.int8

    @property
    def value_offset(self) -> int:
        """First byte of the values."""
        return _round_up(self.page_size * self.key_dim * self.dtype.itemsize, UNIT_BYTES)

    @property
    def scale_offset(self) -> int:
        """First byte of the scales, and of what follows the values in pages without."""
        return self.value_offset + _round_up(self.page_size * self.value_dim * self.dtype.itemsize, UNIT_BYTES)

    @property
    def scale_bytes(self) -> int:
        """Bytes of a token's two scales, 0 without."""
        return 2 * SCALE_DTYPE.itemsize if self.is_int8 else 0

    @property
    def position_offset(self) -> int:
        """First byte of the positions."""
        return self.scale_offset + _round_up(self.page_size * self.scale_bytes, UNIT_BYTES)

    @property
    def nbytes(self) -> int:
        """Bytes of a page, padding included."""
        return _round_up(self.position_offset + 4 * self.page_size, PAGE_ALIGNMENT)

    @property
    def token_bytes(self) -> int:
        """Bytes that one token occupies, scales and position included, padding of the page not."""
        return (self.key_dim + self.value_dim) * self.dtype.itemsize + self.scale_bytes + 4


class PageViews(NamedTuple):
    """Typed views of m pages: keys [m, P, Dk], values [m, P, Dv], positions [m, P] int32."""

    keys: Tensor
    values: Tensor
    positions: Tensor


class Pages:
    """Slabs of pages of one layout on one device.

    anchor: a small tensor of the layout's dtype; kernels add `entry * 16` bytes to its address. Pages of several layouts
    may count from the anchor of the first of them, so that one kernel finds them all; by default they have their own.
    """

    def __init__(self, layout: PageLayout, device: torch.device | str, anchor: Tensor | None = None) -> None:
        self.layout, self.device = layout, torch.device(device)
        self.anchor = _new_anchor(layout.dtype, self.device) if anchor is None else anchor
        place = torch.empty(0, device=self.device).device  # with the index that "cuda" alone leaves open
        if (self.anchor.dtype, self.anchor.device) != (layout.dtype, place):
            raise ValueError(
                f"pages of {layout.dtype} on '{place}' cannot count from an anchor of {self.anchor.dtype} on "
                f"'{self.anchor.device}'"
            )
        self._slabs: dict[int, Tensor] = {}  # by the entry of their first page

    @property
    def slabs(self) -> list[Tensor]:
        """The slabs, uint8 [n_pages, page bytes], in no particular order."""
        return list(self._slabs.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.untyped_storage().nbytes() for slab in self._slabs.values())

    def add_slab(self, n_pages: int) -> Tensor:
        """Allocate n_pages pages; returns their entries [n_pages] int64 on the host, ascending."""
        with torch.inference_mode(False):
            slab = torch.empty((n_pages, self.layout.nbytes), dtype=torch.uint8, device=self.device)
        distance = slab.data_ptr() - self.anchor.data_ptr()
        assert distance % UNIT_BYTES == 0, "torch aligns its allocations to 64 bytes on a CPU and 512 on a GPU"
        first = distance // UNIT_BYTES
        self._slabs[first] = slab
        return torch.arange(n_pages) * (self.layout.nbytes // UNIT_BYTES) + first

    def drop_slab(self, first: int) -> None:
        """Give the slab whose first page has this entry back to the allocator."""
        del self._slabs[first]

    def read(self, entries: Tensor) -> PageViews:
        """Copies of pages, for entries [m] on the host (or on the device, which is then waited for).

        Codes come as the numbers that they stand for, in float32, which holds each of them exactly.
        """
        layout, n = self.layout, entries.numel()
        found = torch.empty((n, layout.nbytes), dtype=torch.uint8, device=self.device)
        for slab, index, where in self._located(entries):
            found[where] = slab[index]
        views = typed(found, layout)
        if not layout.is_int8:
            return views
        scales = typed_scales(found, layout)
        keys, values = (dequantise(codes, scales[..., side], torch.float32) for side, codes in enumerate(views[:2]))
        return PageViews(keys, values, views.positions)

    def read_positions(self, entries: Tensor) -> Tensor:
        """Positions [m, P] int32 of pages; their keys and values are not touched."""
        found = torch.empty((entries.numel(), self.layout.page_size), dtype=torch.int32, device=self.device)
        for slab, index, where in self._located(entries):
            found[where] = typed(slab, self.layout).positions[index]
        return found

    def write(self, entries: Tensor, slots: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Store tokens: token i goes to slot slots[i] of the page entries[i].

        entries, slots: [m] int64; keys [m, Dk], values [m, Dv] of any float dtype; positions [m].
        """
        for slab, index, where in self._located(entries):
            into, at = typed(slab, self.layout), slots.to(self.device)[where]
            for side, (target, vectors) in enumerate(((into.keys, keys[where]), (into.values, values[where]))):
                if self.layout.is_int8:
                    target[index, at], typed_scales(slab, self.layout)[index, at, side] = quantise(vectors)
                else:
                    target[index, at] = vectors.to(self.layout.dtype)
            into.positions[index, at] = positions.to(self.device)[where].to(torch.int32)

    def move(self, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> None:
        """Copy tokens with every bit, from (entries, slots) [m] each to other ones; all are read before any is written."""
        held: list[Tensor] = []
        for slab, index, where in self._located(source[0]):
            for number, part in enumerate(self._parts(slab)):
                if number == len(held):
                    held.append(part.new_empty((source[0].numel(), *part.shape[2:])))
                held[number][where] = part[index, source[1].to(self.device)[where]]
        for slab, index, where in self._located(target[0]):
            for part, tokens in zip(self._parts(slab), held, strict=True):
                part[index, target[1].to(self.device)[where]] = tokens[where]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy whole pages, entries [m] to entries [m]; no page may be in both. Takes COPY_BYTES besides."""
        size = max(1, COPY_BYTES // self.layout.nbytes)
        for part, into in zip(source.split(size), target.split(size), strict=True):
            block = torch.empty((part.numel(), self.layout.nbytes), dtype=torch.uint8, device=self.device)
            for slab, index, where in self._located(part):
                block[where] = slab[index]
            for slab, index, where in self._located(into):
                slab[index] = block[where]

    def _parts(self, raw: Tensor) -> list[Tensor]:
        """Views [m, P, ...] of all that raw pages say of each token."""
        parts = list(typed(raw, self.layout))
        return [*parts, typed_scales(raw, self.layout)] if self.layout.is_int8 else parts

    def _located(self, entries: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(slab, indices of pages in it, places in `entries`) for every slab that holds some of the entries.

        Looked up on the host, which entries usually come from: on the device each slab would cost a wait.
        """
        step, found = self.layout.nbytes // UNIT_BYTES, []
        host = entries.cpu()
        for first, slab in self._slabs.items():
            where = ((host >= first) & (host < first + slab.shape[0] * step)).nonzero().flatten()
            if where.numel():
                index = (host[where] - first) // step
                found.append((slab, index.to(self.device, non_blocking=True), where.to(self.device, non_blocking=True)))
        return found


def typed(raw: Tensor, layout: PageLayout) -> PageViews:
    """Views of raw pages [m, page bytes] uint8, codes as they are."""
    end = layout.position_offset
    n_key = layout.page_size * layout.key_dim * layout.dtype.itemsize
    n_value = layout.page_size * layout.value_dim * layout.dtype.itemsize
    return PageViews(
        raw[:, :n_key].view(layout.dtype).unflatten(1, (layout.page_size, layout.key_dim)),
        raw[:, layout.value_offset : layout.value_offset + n_value]
        .view(layout.dtype)
        .unflatten(1, (layout.page_size, layout.value_dim)),
        raw[:, end : end + 4 * layout.page_size].view(torch.int32),
    )


def typed_scales(raw: Tensor, layout: PageLayout) -> Tensor:
    """Scales [m, P, 2] float16, of keys and of values, in raw int8 pages [m, page bytes] uint8; a view."""
    end = layout.scale_offset + layout.page_size * layout.scale_bytes
    scales: Tensor = raw[:, layout.scale_offset : end].view(SCALE_DTYPE).unflatten(1, (layout.page_size, 2))
    return scales


def n_pages(lengths: Tensor, page_size: int) -> Tensor:
    """Pages that segments of these lengths occupy."""
    return (lengths + page_size - 1) // page_size


def _new_anchor(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode later
        anchor = torch.zeros(UNIT_BYTES, dtype=dtype, device=device)
    # Triton addresses small tensors with 32 bits on ROCm; from this one kernels reach everywhere
    anchor.ptr_range = _any_distance  # type: ignore[attr-defined]
    return anchor


def _any_distance() -> int:
    return 1 << 62


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
