"""PagePool: which pages are free, how often each is used, and when slabs come from and go back to the allocator.

All book-keeping is on the host, in numpy: the host knows every length, so it can hand out pages ahead of the steps that
fill them, and no step ever waits for the device. One pool serves all layers, rows and heads of one layout and device.

    allocate   pages from the fullest slabs first, so that the others empty; a new slab when none is left
    share      one more user of a page (beams, repeated rows); writers copy a shared page first
    release    one user less; a page without users is free, a slab without used pages can go
    tidy       give empty slabs back, and move pages together when half of the pool is idle
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpress_kernels.pages import UNIT_BYTES, PageLayout, Pages

Entries = npt.NDArray[np.int64]
#: (old entries, new entries, ascending old) -> None: replace them in a page table
Remap = Callable[[Entries, Entries], None]

#: a slab has at least this share of the pages in use, so that their number stays small, ...
GROWTH = 1 / 16
#: ... unless that is more than this many bytes
MAX_GROWTH_BYTES = 64 << 20
#: pages are moved together when more than this share of the pool is idle
IDLE_SHARE = 0.5


@dataclass
class _Slab:
    """first: entry of its first page; uses: users of each page; free: stack of the indices that nobody uses."""

    first: int
    uses: npt.NDArray[np.int32]
    free: npt.NDArray[np.int64]
    n_free: int

    @property
    def n_pages(self) -> int:
        return len(self.uses)


class PagePool:
    """Pages of one layout on one device, with reference counts. anchor: of another pool's pages, to share it."""

    def __init__(self, layout: PageLayout, device: torch.device | str, anchor: Tensor | None = None) -> None:
        self.pages = Pages(layout, device, anchor)
        self._slabs: list[_Slab] = []
        self._step = layout.nbytes // UNIT_BYTES
        self._tables: list[weakref.WeakMethod[Remap]] = []

    @property
    def layout(self) -> PageLayout:
        return self.pages.layout

    @property
    def n_pages(self) -> int:
        """Pages of all slabs."""
        return sum(slab.n_pages for slab in self._slabs)

    @property
    def n_free(self) -> int:
        """Pages that nobody uses."""
        return sum(slab.n_free for slab in self._slabs)

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return self.pages.nbytes

    @property
    def idle_bytes(self) -> int:
        """Bytes of free pages."""
        return self.n_free * self.layout.nbytes

    def register(self, remap: Remap) -> None:
        """Have a bound method called when pages move; forgotten when its object is gone."""
        self._tables = [table for table in self._tables if table() is not None]
        self._tables.append(weakref.WeakMethod(remap))

    def allocate(self, n: int) -> Entries:
        """Entries [n] of pages with one user each; their content is undefined."""
        missing = n - self.n_free
        if missing > 0:
            grown = min(int((self.n_pages - self.n_free) * GROWTH), MAX_GROWTH_BYTES // self.layout.nbytes)
            self._add_slab(max(missing, grown))
        parts = []
        for slab in sorted((slab for slab in self._slabs if slab.n_free), key=lambda slab: slab.n_free):
            taken = min(n, slab.n_free)
            index = slab.free[slab.n_free - taken : slab.n_free][::-1]
            slab.uses[index] = 1
            slab.n_free -= taken
            parts.append(slab.first + index * self._step)
            n -= taken
            if not n:
                break
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def share(self, entries: Entries) -> None:
        """Count one more user for each entry; an entry may occur several times."""
        for slab, index in self._located(entries):
            np.add.at(slab.uses, index, 1)

    def release(self, entries: Entries) -> None:
        """Count one user less for each entry; pages without users are free from here on."""
        for slab, index in self._located(entries):
            np.subtract.at(slab.uses, index, 1)
            assert slab.uses[index].min(initial=0) >= 0, "a page was released more often than it was used"
            freed = np.unique(index[slab.uses[index] == 0])
            slab.free[slab.n_free : slab.n_free + len(freed)] = freed[::-1]
            slab.n_free += len(freed)

    def uses(self, entries: Entries) -> npt.NDArray[np.int32]:
        """Users of each entry."""
        found = np.zeros(len(entries), np.int32)
        for slab in self._slabs:
            inside = self._inside(slab, entries)
            found[inside] = slab.uses[(entries[inside] - slab.first) // self._step]
        return found

    def tidy(self) -> None:
        """Give empty slabs back to the allocator; if still more than half of the pool is idle, move pages together."""
        self._drop_empty()
        if self.n_free > IDLE_SHARE * self.n_pages:
            self.defragment()

    def defragment(self) -> None:
        """Empty the slabs with the fewest used pages into the free pages of the others, and give them back."""
        by_use = sorted(self._slabs, key=lambda slab: slab.n_pages - slab.n_free)
        room, leaving = self.n_free, list[_Slab]()
        for slab in by_use[:-1]:
            room -= slab.n_pages  # its own free pages go with it, its used ones need a place elsewhere
            if room < 0:
                break
            leaving.append(slab)
        self._leave(leaving)
        sparse = [slab for slab in self._slabs if slab.n_free > IDLE_SHARE * slab.n_pages]
        if self.n_free > IDLE_SHARE * self.n_pages and sparse:  # large slabs with few pages: into one that they fill
            used = sum(slab.n_pages - slab.n_free for slab in sparse)
            if used:
                self._add_slab(used)
            self._leave(sparse)

    def _leave(self, leaving: list[_Slab]) -> None:
        """Move the used pages of slabs into free pages of the others, and give the slabs back."""
        if any(slab.n_free < slab.n_pages for slab in leaving):
            self._move_out(leaving)
        for slab in leaving:
            self._slabs.remove(slab)
            self.pages.drop_slab(slab.first)

    def _move_out(self, leaving: list[_Slab]) -> None:
        """Move used pages with their counts, and tell the tables; the books change when the pages have arrived."""
        used = [(slab, np.flatnonzero(slab.uses)) for slab in leaving]
        old = np.concatenate([slab.first + index * self._step for slab, index in used])
        counts = np.concatenate([slab.uses[index] for slab, index in used])
        free = [slab.n_free for slab in leaving]
        for slab in leaving:
            slab.n_free = 0  # nothing is allocated there any more
        new = self.allocate(len(old))
        try:
            self.pages.copy(torch.from_numpy(old), torch.from_numpy(new))
        except RuntimeError:  # out of memory: everything stays where it is
            self.release(new)
            for slab, n in zip(leaving, free, strict=True):
                slab.n_free = n
            raise
        for slab, index in self._located(new):
            slab.uses[index] = 0  # set to the old counts below
        self._add_uses(new, counts)
        order = np.argsort(old)
        for table in self._tables:
            remap = table()
            if remap is not None:
                remap(old[order], new[order])

    def __deepcopy__(self, memo: dict[int, Any]) -> PagePool:
        """A pool of its own with the same pages; `memo` learns where each slab went, for the tables.

        Pools that share an anchor, copied together, share a new one.
        """
        copied = PagePool(self.layout, self.pages.device, memo.get(id(self.pages.anchor)))
        memo[id(self)], memo[id(self.pages.anchor)] = copied, copied.pages.anchor
        contents = {slab.first: content for slab, content in zip(self._slabs, self.pages.slabs, strict=True)}
        for slab in self._slabs:
            copied._add_slab(slab.n_pages)
            new = copied._slabs[-1]
            new.uses, new.free, new.n_free = slab.uses.copy(), slab.free.copy(), slab.n_free
            copied.pages.slabs[-1].copy_(contents[slab.first])
        return copied

    def translate(self, entries: Entries, other: PagePool) -> Entries:
        """Entries of this pool as those of its deep copy `other`."""
        found = entries.copy()
        for mine, theirs in zip(self._slabs, other._slabs, strict=True):
            inside = self._inside(mine, entries)
            found[inside] = entries[inside] - mine.first + theirs.first
        return found

    def _add_slab(self, n_pages: int) -> None:
        entries = self.pages.add_slab(n_pages)
        free = np.arange(n_pages, dtype=np.int64)[::-1].copy()  # a stack: the lowest index is handed out first
        self._slabs.append(_Slab(int(entries[0]), np.zeros(n_pages, np.int32), free, n_pages))

    def _drop_empty(self) -> None:
        for slab in [slab for slab in self._slabs if slab.n_free == slab.n_pages]:
            self._slabs.remove(slab)
            self.pages.drop_slab(slab.first)

    def _add_uses(self, entries: Entries, counts: npt.NDArray[np.int32]) -> None:
        for slab in self._slabs:
            inside = self._inside(slab, entries)
            slab.uses[(entries[inside] - slab.first) // self._step] += counts[inside]

    def _inside(self, slab: _Slab, entries: Entries) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = (entries >= slab.first) & (entries < slab.first + slab.n_pages * self._step)
        return found

    def _located(self, entries: Entries) -> list[tuple[_Slab, Entries]]:
        found = []
        for slab in self._slabs:
            inside = entries[self._inside(slab, entries)]
            if len(inside):
                found.append((slab, (inside - slab.first) // self._step))
        return found
