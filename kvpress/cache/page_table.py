"""PageTable: which pages the rows of one layer own, on the host and on the device.

    device [R, M] int64   entries of the pages of row r = b * H + h, in order (kvpress_kernels/pages.py)
    n_pages [R]           how many of them are row r's; the rest of the row is unused

The host decides and the device copy follows, in the same tensor as long as the shape stays, so that a captured decode
step reads the new pages. Rows may share pages; a page that somebody else uses is copied before it is written.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpress_kernels.page_pool import Entries, PagePool

Counts = npt.NDArray[np.int64]


class PageTable:
    """Rows of pages out of a pool. `version` grows with every change of the table."""

    def __init__(self, pool: PagePool, n_rows: int) -> None:
        self.pool = pool
        self.n_pages: Counts = np.zeros(n_rows, np.int64)
        self.version = 0
        self._host: Entries = np.zeros((n_rows, 0), np.int64)
        self._may_share = False
        self._sync()
        pool.register(self._remap)

    @property
    def nbytes(self) -> int:
        """Bytes of the device table."""
        return int(self.device.nbytes)

    @property
    def page_bytes(self) -> int:
        """Bytes of the pages that rows own; a page that several rows share counts once."""
        return len(np.unique(self._owned())) * self.pool.layout.nbytes

    def distinct_tokens(self, lengths: Sequence[int]) -> int:
        """Tokens stored when row r holds lengths[r]; those in a page that several rows share count once."""
        first = np.arange(self._host.shape[1]) * self.pool.layout.page_size
        filled = np.clip(np.asarray(lengths, np.int64)[:, None] - first, 0, self.pool.layout.page_size)
        owned = np.arange(self._host.shape[1]) < self.n_pages[:, None]
        pages, place = np.unique(self._host[owned], return_inverse=True)
        most = np.zeros(len(pages), np.int64)
        np.maximum.at(most, place, filled[owned])
        return int(most.sum())

    def all_rows(self) -> tuple[Tensor, Counts]:
        """Entries [m] of all rows one after the other, on the host, and the row of each."""
        return torch.from_numpy(self._owned()), np.repeat(np.arange(len(self.n_pages)), self.n_pages)

    def __del__(self) -> None:
        if not sys.is_finalizing() and hasattr(self, "_host"):
            self.pool.release(self._owned())

    def __deepcopy__(self, memo: dict[int, Any]) -> PageTable:
        copied = PageTable(copy.deepcopy(self.pool, memo), len(self.n_pages))
        memo[id(self)] = copied
        copied._host, copied.n_pages = self.pool.translate(self._host, copied.pool), self.n_pages.copy()
        copied._may_share = self._may_share
        copied._sync()
        return copied

    def row(self, index: int, n_pages: int) -> Tensor:
        """Entries [n_pages] of a row's first pages, on the host."""
        return torch.from_numpy(self._host[index, :n_pages])

    def grow(self, wanted: Counts) -> None:
        """Give rows new pages until row r has wanted[r]; none loses any."""
        wanted = np.maximum(wanted, self.n_pages)
        width = int(wanted.max(initial=0))
        if width > self._host.shape[1]:
            # wider than needed, since a new width is a new tensor and a new launch grid
            wide = width + width // 8 + 2
            self._host = np.pad(self._host, ((0, 0), (0, wide - self._host.shape[1])))
        column = np.arange(self._host.shape[1])
        fresh = (column >= self.n_pages[:, None]) & (column < wanted[:, None])
        self._host[fresh] = self.pool.allocate(int(fresh.sum()))
        self.n_pages = wanted
        self._sync()

    def keep(self, pages: Sequence[npt.NDArray[np.int64]]) -> None:
        """Reduce row r to its pages number pages[r], in that order; the others lose a user."""
        old, table = self._owned(), np.zeros_like(self._host)
        for row, index in enumerate(pages):
            table[row, : len(index)] = self._host[row, index]
        self._replace(table, np.array([len(index) for index in pages], np.int64), old)

    def select_rows(self, rows: Sequence[int], n_pages: Counts) -> None:
        """Row i becomes the old row rows[i] and shares its first n_pages[i] pages with it."""
        self._may_share = True
        self._replace(self._host[list(rows)], n_pages, self._owned())

    @staticmethod
    def joined(tables: Sequence[PageTable]) -> PageTable:
        """A table whose rows are those of several tables of one pool, and share their pages."""
        pool = tables[0].pool
        assert all(table.pool is pool for table in tables), "pages are shared within one pool"
        new = PageTable(pool, sum(len(table.n_pages) for table in tables))
        width = max(table._host.shape[1] for table in tables)
        padded = [np.pad(table._host, ((0, 0), (0, width - table._host.shape[1]))) for table in tables]
        for table in [new, *tables]:
            table._may_share = True
        new._replace(np.concatenate(padded), np.concatenate([table.n_pages for table in tables]), new._owned())
        return new

    def own(self, first: Counts, last: Counts) -> None:
        """See to it that nobody else uses the pages first[r] .. last[r] - 1 of row r, copying where somebody does."""
        if not self._may_share:
            return
        column = np.arange(self._host.shape[1])
        last = np.minimum(last, self.n_pages)
        chosen = (column >= first[:, None]) & (column < last[:, None])
        chosen[chosen] = self.pool.uses(self._host[chosen]) > 1
        if not chosen.any():
            return
        old, new = self._host[chosen], self.pool.allocate(int(chosen.sum()))
        self.pool.pages.copy(torch.from_numpy(old), torch.from_numpy(new))
        self._host[chosen] = new
        self.pool.release(old)
        self._sync()

    def _replace(self, table: Entries, n_pages: Counts, old: Entries) -> None:
        self._host, self.n_pages = table, n_pages
        self.pool.share(self._owned())  # before the release, so that no page is free in between
        self.pool.release(old)
        self._sync()

    def _owned(self) -> Entries:
        return self._host[np.arange(self._host.shape[1]) < self.n_pages[:, None]]

    def _remap(self, old: Entries, new: Entries) -> None:
        """The pool has moved the pages old [m], ascending, to new [m]."""
        place = np.searchsorted(old, self._host).clip(max=len(old) - 1)
        self._host = np.where(old[place] == self._host, new[place], self._host)
        self._sync()

    def _sync(self) -> None:
        self.version += 1
        self.device = upload(self._host, torch.int64, getattr(self, "device", None), self.pool.pages.device)


def upload(host: npt.ArrayLike, dtype: torch.dtype, target: Tensor | None, device: torch.device) -> Tensor:
    """A host array on the device: in `target` if its shape fits, else in a new tensor, writable in any mode."""
    source = torch.tensor(host, dtype=dtype)  # a copy: the host's array may change before the device has read it
    if device.type == "cuda":  # from pinned memory, so that the host does not wait for what the device is doing
        source = source.pin_memory()
    if target is not None and target.shape == source.shape:
        return target.copy_(source, non_blocking=True)
    with torch.inference_mode(False):
        return source.to(device, copy=True, non_blocking=True)
