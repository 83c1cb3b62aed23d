"""PagedStore: kept tokens of one layer in pages, each of which belongs to one (row, KV head).

    table            pages of every row (kvpress/cache/page_table.py)
    device_lengths   [R] int32, tokens stored in each row r = b * H + h; its host copy is `lengths`

Evicting whole pages moves no bytes: they leave the table and are free for any head and layer of the same pool. The host
knows every length, so it hands out pages ahead of the steps that fill them, and a decode step never waits for the
device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpress.cache.page_table import Counts, PageTable, upload
from kvpress_kernels.dispatch import BackendName, op
from kvpress_kernels.page_pool import PagePool


class PagedStore:
    """Ragged K/V storage of one layer over a pool of pages; policy-free (it is told what to keep)."""

    def __init__(
        self, keys: Tensor, values: Tensor, kept: Sequence[Tensor], pool: PagePool, backend: BackendName
    ) -> None:
        """Copy the kept tokens of dense tensors into pages.

        Args:
            keys: [B, H, n, D], values: [B, H, n, Dv].
            kept: for each (row, head), row-major, the ascending columns [m] to store; m may differ.
            pool: where pages come from; its layout must fit keys and values, and may be one of int8.
            backend: who runs the ops, "torch" or "triton".
        """
        self.n_heads, self.backend, self.dtype = keys.shape[1], backend, keys.dtype
        self.lengths = [int(columns.numel()) for columns in kept]
        self.table = PageTable(pool, len(kept))
        self._set_lengths(self.lengths)
        self.table.grow(self._pages_for(self.lengths))
        self._work: tuple[int, Any] = (0, None)
        columns = torch.cat([column.to(keys.device, torch.int32) for column in kept])
        self._op("gather_pages")(
            keys, values, columns, self._offsets(), self._pages, self.table.device, max_kept=max(self.lengths)
        )

    @property
    def n_rows(self) -> int:
        return len(self.lengths) // self.n_heads

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.table.pool.layout.page_size

    @property
    def token_bytes(self) -> int:
        """Bytes of one stored token in one head, scales and position included."""
        return self.table.pool.layout.token_bytes

    @property
    def room(self) -> list[int]:
        """Tokens that fit into each row's pages."""
        return [int(n) * self.page_size for n in self.table.n_pages]

    @property
    def nbytes(self) -> int:
        """Bytes of pages and tables; a page that rows share counts once, free pages belong to the pool."""
        return self.table.page_bytes + self._table_bytes

    def row_bytes(self, row: int) -> int:
        """Bytes of the pages of one row, shared ones included."""
        pages = self.table.n_pages[row * self.n_heads : (row + 1) * self.n_heads]
        return int(pages.sum()) * self.table.pool.layout.nbytes

    @property
    def index_bytes(self) -> int:
        """Of `nbytes`, what says where tokens are: positions and the page table."""
        return self.table.distinct_tokens(self.lengths) * 4 + self._table_bytes

    @property
    def slack_bytes(self) -> int:
        """Of `nbytes`, room that holds no token yet."""
        return self.table.page_bytes - self.table.distinct_tokens(self.lengths) * self.token_bytes

    def decode(self, query: Tensor, **options: Any) -> Tensor:
        """Attention of one token a row: query [B, H, G, D] -> [B, H, G, Dv]; options of `ragged_decode`."""
        output: Tensor = self._op("ragged_decode")(query, *self._stored, work=self.work_list(), **options).output
        return output

    def attend(self, query: Tensor, columns: Tensor, **options: Any) -> Tensor:
        """Attention of q tokens a row in columns [q]: query [B, H, G, q, D] -> [B, H, G, q, Dv]."""
        output: Tensor = self._op("ragged_attention")(query, *self._stored, columns, **options)
        return output

    def work_list(self) -> Any:
        """The work list of the balanced decode where heads differ much in length, else None.

        Made from the pages handed out, so it changes only with the table; in the same tensors where it can.
        """
        if self.backend != "triton":
            return None
        version, work = self._work
        if version != self.table.version:
            from kvpress_kernels.work_list import CHUNK_PAGES, prefers_work_list, work_list

            fresh = None
            if prefers_work_list(self.lengths):
                items = int((-(-self.table.n_pages // CHUNK_PAGES)).sum())
                known = 0 if work is None else work.row.numel()
                # with room to grow, so that the shape, and with it a captured step, outlasts the next pages
                items = known if known >= items else items + items // 8 + 1
                handed_out = upload(self.table.n_pages * self.page_size, torch.int32, None, self._pages.device)
                with torch.inference_mode(False):  # it is written again when the table changes
                    fresh = work_list(handed_out, self.page_size, self.table.device.shape[1], max_items=items)
            work = _renewed(work, fresh)
            self._work = self.table.version, work
        return work

    def addresses(self) -> tuple[Any, ...]:
        """What a captured decode step has built in: the tensors it reads and the shapes of its launch grid."""
        work = self.work_list() or ()
        tensors = [self.table.device, self.device_lengths, *(part for part in work if isinstance(part, Tensor))]
        return (self._pages.anchor.data_ptr(), *((tensor.data_ptr(), *tensor.shape) for tensor in tensors))

    def reset_device_lengths(self) -> None:
        """Make the device count what the host counts."""
        self._set_lengths(self.lengths)

    def segment(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of one row's keys [n, D] and values [n, Dv], in the model's dtype, and positions [n]."""
        n = self.lengths[index]
        found = self._pages.read(self.table.row(index, -(-n // self.page_size)))
        keys, values = (part.flatten(0, 1)[:n].to(self.dtype) for part in (found.keys, found.values))
        return keys, values, found.positions.flatten()[:n]

    def bases(self, index: int) -> None:
        """None: what a segment shows is of full size."""

    def segments(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All rows, in order."""
        return (self.segment(index) for index in range(len(self.lengths)))

    def append(self, keys: Tensor, values: Tensor, columns: Tensor, valid: Tensor | None = None) -> None:
        """Add new tokens at the end of every row.

        Args:
            keys: [B, H, q, D], values: [B, H, q, Dv], columns: [q] their columns in the input.
            valid: [B, q] bool on the host, False for padding, which is not stored; None when there is none.
        """
        counts = [keys.shape[2]] * self.n_rows if valid is None else [int(row.sum()) for row in valid]
        new = [count for count in counts for _ in range(self.n_heads)]
        self.reserve(new)
        self.append_reserved(keys, values, columns, None if valid is None else valid.to(keys.device))
        self.advance(new)

    def reserve(self, new: Sequence[int]) -> None:
        """Have pages, used by nobody else, for that many more tokens in each row."""
        ends = np.asarray(self.lengths, np.int64) + np.asarray(new, np.int64)
        needed = self._pages_for(ends)
        self.table.own(np.asarray(self.lengths, np.int64) // self.page_size, needed)
        if (needed > self.table.n_pages).any():
            # room for nearly a page more in every row, so that tables change once in page_size steps, not at each
            self.table.grow(self._pages_for(ends + self.page_size - 1))

    def append_reserved(self, keys: Tensor, values: Tensor, columns: Tensor, valid: Tensor | None = None) -> None:
        """The device's part of `append`: store tokens behind `device_lengths` and count them there."""
        self._op("append")(keys, values, columns, *self._stored, valid=valid)

    def advance(self, new: Sequence[int]) -> None:
        """The host's part of `append`: count the tokens that the device has stored."""
        self.lengths = [n + more for n, more in zip(self.lengths, new, strict=True)]

    def keep(self, kept: Sequence[Tensor]) -> None:
        """Reduce every row to the tokens that `kept` [n] (ascending indices) names, and free the rest.

        Where every row keeps or drops whole pages only tables change; otherwise tokens move up within their row.
        """
        indices = [index.cpu().numpy() for index in kept]
        whole = [self._whole_pages(index, n) for index, n in zip(indices, self.lengths, strict=True)]
        lengths = [len(index) for index in indices]
        if any(pages is None for pages in whole):
            self.table.own(np.zeros_like(self.table.n_pages), self._pages_for(self.lengths))
            flat = upload(np.concatenate(indices), torch.int32, None, self._pages.device)
            self._op("compact")(*self._stored, flat, self._offsets(lengths))
            whole = [np.arange(n) for n in self._pages_for(lengths)]
        self.table.keep([pages for pages in whole if pages is not None])
        self._set_lengths(lengths)
        self.table.pool.tidy()

    def truncate(self, column: int) -> None:
        """Forget tokens at or behind a column of the input (a rejected draft); their room becomes slack."""
        self._set_lengths(self.stored_before(column))

    def stored_before(self, column: int) -> list[int]:
        """Tokens of each row that stand before a column of the input; one look at the device for all rows."""
        entries, rows = self.table.all_rows()
        first = np.concatenate([np.arange(n) for n in self.table.n_pages] or [np.empty(0, np.int64)]) * self.page_size
        device = self._pages.device
        left = upload(np.asarray(self.lengths, np.int64)[rows] - first, torch.int64, None, device)
        before = self._pages.read_positions(entries) < column  # [m, P]
        before &= torch.arange(self.page_size, device=device) < left[:, None]
        counts = torch.zeros(len(self.lengths), dtype=torch.int64, device=device)
        found: list[int] = counts.index_add_(0, upload(rows, torch.int64, None, device), before.sum(1)).tolist()
        return found

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep, reorder or repeat rows (beam search): row i becomes the old row rows[i]. Pages are shared, not copied."""
        chosen = [row * self.n_heads + head for row in rows for head in range(self.n_heads)]
        if chosen == list(range(len(self.lengths))):
            return
        lengths = [self.lengths[i] for i in chosen]
        fewer = len(lengths) < len(self.lengths)
        self.table.select_rows(chosen, self._pages_for(lengths))  # an empty page that waits for tokens is not shared
        self._set_lengths(lengths)
        if fewer:
            self.table.pool.tidy()

    @staticmethod
    def joined(stores: Sequence[PagedStore]) -> PagedStore:
        """A store over the same pool whose rows are those of several stores; pages are shared until they are written."""
        new = copy.copy(stores[0])
        del new.device_lengths
        new.table = PageTable.joined([store.table for store in stores])
        new._work = (0, None)
        new._set_lengths([n for store in stores for n in store.lengths])
        return new

    # --- helpers

    @property
    def _pages(self) -> Any:
        return self.table.pool.pages

    @property
    def _stored(self) -> tuple[Any, Tensor, Tensor]:
        return self._pages, self.table.device, self.device_lengths

    @property
    def _table_bytes(self) -> int:
        work = [part.nbytes for part in self._work[1] or () if isinstance(part, Tensor)]
        return int(self.table.nbytes + self.device_lengths.nbytes + sum(work))

    def _op(self, name: str) -> Any:
        return op(name, self.backend)

    def _pages_for(self, lengths: npt.ArrayLike) -> Counts:
        pages: Counts = -(-np.asarray(lengths, np.int64) // self.page_size)
        return pages

    def _whole_pages(self, index: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.int64] | None:
        """The pages that hold just the tokens `index` of n; None if a page is kept in part or a short one is not last."""
        pages, size = np.unique(index // self.page_size, return_counts=True)
        filled = np.minimum(n - pages * self.page_size, self.page_size)
        return pages if (size == filled).all() and (filled[:-1] == self.page_size).all() else None

    def _set_lengths(self, lengths: list[int]) -> None:
        self.lengths = lengths
        device = self._pages.device
        self.device_lengths = upload(lengths, torch.int32, getattr(self, "device_lengths", None), device)

    def _offsets(self, lengths: Sequence[int] | None = None) -> Tensor:
        """[R + 1] int32 on the device: where each row starts in a flat list."""
        ends = np.cumsum(self.lengths if lengths is None else lengths)
        return upload(np.concatenate([[0], ends]), torch.int32, None, self._pages.device)


def _renewed(old: Any, fresh: Any) -> Any:
    """The fresh tuple of tensors, written into the old one where the shapes allow: a captured step reads those."""
    if old is None or fresh is None:
        return fresh
    pairs = [(a, b) for a, b in zip(old, fresh, strict=True) if isinstance(a, Tensor)]
    if any(a.shape != b.shape for a, b in pairs):
        return fresh
    for mine, new in pairs:
        mine.copy_(new)
    return old
