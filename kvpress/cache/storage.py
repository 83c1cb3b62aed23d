"""The tokens of one layer: dense while the prompt is read, packed and ragged afterwards. Knows nothing of policies.

Columns count the (padded) input; positions count from a row's first real token, so that a row in a padded batch is
decided like the same row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress.backend import Backend
from kvpress.cache.formats import LayerFormat
from kvpress.cache.joined_rows import JoinedRows
from kvpress.cache.packed import PackedStore
from kvpress.cache.paged import PagedStore
from kvpress.cache.projected import ProjectedStore
from kvpress.errors import KvpressError
from kvpress.evidence import HeadGroup
from kvpress.slots.budget import Unit
from kvpress_kernels.page_pool import PagePool
from kvpress_kernels.pages import PageLayout

Store = PackedStore | PagedStore | ProjectedStore | JoinedRows


@dataclass(frozen=True)
class Packing:
    """How a layer packs its tokens.

    make: (keys [B, H, n, D], values, columns to store for each row and head) -> the store that holds them. native_bytes: of a token in
    one head in the model's own dtype, without a position. head_bytes: of a packed token in each head, its position included. page_size:
    tokens that a head stores together; page_bytes: their bytes, as a mean over the heads of all layers.
    """

    make: Callable[[Tensor, Tensor, Sequence[Tensor]], Store]
    native_bytes: int
    head_bytes: tuple[int, ...]
    page_size: int
    page_bytes: int

    def unit(self, even: bool) -> Unit:
        """What one head stores together; `even`: all heads of a row get the same number of tokens."""
        return Unit(self.page_size, self.page_bytes, 0 if even else self.page_size - 1)


class LayerStorage:
    """Keys and values of B rows and H KV heads.

    dense: keys [B, H, n, D] and values [B, H, n, Dv], or None; store: the packed tokens, or None. Exactly one of the
    two is there once a token has been seen. valid: [B, n] bool on the host, None without padding.
    """

    def __init__(self, n_rows: int, n_heads: int, packing: Packing | None = None) -> None:
        self.n_rows, self.n_heads = n_rows, n_heads
        self._packing = packing
        self.dense: tuple[Tensor, Tensor] | None = None
        self.store: Store | None = None
        self.valid: Tensor | None = None

    @property
    def packing(self) -> Packing:
        """How tokens are packed; known as soon as a token has been seen."""
        assert self._packing is not None
        return self._packing

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        packed = self.store.nbytes if self.store is not None else 0
        storages = {s.data_ptr(): s.nbytes() for t in self.dense or () if (s := t.untyped_storage())}
        return packed + sum(storages.values())

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The dense tensors with new ones behind them; nothing is stored."""
        if self.dense is None:
            return keys, values
        return torch.cat([self.dense[0], keys], 2), torch.cat([self.dense[1], values], 2)

    def append(self, keys: Tensor, values: Tensor, first: int) -> None:
        """Pack new tokens [B, H, q, D] of columns first, first + 1, ...; padding among them is left out."""
        assert self.store is not None
        n_new = keys.shape[2]
        valid = None if self.valid is None else self.valid[:, first : first + n_new]
        if valid is not None and bool(valid.all()):  # also where nobody described the new columns
            valid = None
        self.store.append(keys, values, torch.arange(first, first + n_new, device=keys.device), valid)

    def note_padding(self, valid: Tensor) -> None:
        """Learn which columns [B, n] hold real tokens."""
        if self.valid is None and bool(valid.all()):
            return
        self.valid = valid

    def real_tokens(self, row: int, limit: int) -> int:
        """Real tokens of a row in columns before `limit`, evicted ones included."""
        if self.valid is None:
            return limit
        return int(self.valid[row, :limit].sum()) + max(limit - self.valid.shape[1], 0)

    def positions(self, row: int, columns: Tensor) -> Tensor:
        """Places of columns among a row's real tokens, -1 for padding; columns nobody described are real."""
        if self.valid is None:
            return columns
        valid = self.valid[row].to(columns.device)
        ranks = torch.where(valid, valid.long().cumsum(0) - 1, -1)
        inside = columns < valid.numel()
        return torch.where(inside, ranks[columns.clamp(max=valid.numel() - 1)], columns - valid.numel() + valid.sum())

    def groups(self, row: int, limit: int) -> list[HeadGroup]:
        """What is stored of a row in columns before `limit`, as evidence reads it."""
        if self.store is None:
            assert self.dense is not None
            keys, values = self.dense[0][row], self.dense[1][row]
            columns = self._columns(row, limit)
            if columns.numel() == 0:
                return [HeadGroup(keys[:, :0], values[:, :0], columns.to(keys.device))]
            first, last = int(columns[0]), int(columns[-1])
            # left padding leaves one run of columns, which is a view; holes cost a copy
            run = slice(first, last + 1) if last - first + 1 == columns.numel() else columns.to(keys.device)
            return [HeadGroup(keys[:, run], values[:, run], self.positions(row, columns).to(keys.device))]
        found = []
        for head in range(self.n_heads):
            index = row * self.n_heads + head
            keys, values, positions = self.store.segment(index)
            n = int((positions < limit).sum())
            at = self.positions(row, positions[:n].long())
            found.append(HeadGroup(keys[None, :n], values[None, :n], at, self.store.bases(index)))
        return found

    def keep(self, kept: Sequence[Sequence[Tensor]] | None, limit: int) -> None:
        """Store only the kept tokens and all at or behind `limit`; dense tensors are packed and let go.

        kept: per row and head the ascending indices among the tokens that `groups` showed; None keeps everything.
        """
        if self.store is None:
            assert self.dense is not None
            columns = []
            for row in range(self.n_rows):
                stored = self._columns(row, self.dense[0].shape[2]).to(self.dense[0].device)
                older, newer = stored[stored < limit], stored[stored >= limit]
                for head in range(self.n_heads):
                    columns.append(stored if kept is None else torch.cat([older[kept[row][head]], newer]))
            self.store, self.dense = self.packing.make(*self.dense, columns), None
        elif kept is not None:
            indices = []
            for index, n_older in enumerate(self.store.stored_before(limit)):
                row, head = divmod(index, self.n_heads)
                newer = torch.arange(n_older, self.store.lengths[index], device=kept[row][head].device)
                indices.append(torch.cat([kept[row][head], newer]))
            self.store.keep(indices)

    def truncate(self, column: int) -> None:
        """Forget everything at or behind a column."""
        if self.valid is not None:
            self.valid = self.valid[:, :column]
        if self.store is not None:
            self.store.truncate(column)
        elif self.dense is not None:
            self.dense = (self.dense[0][:, :, :column], self.dense[1][:, :, :column])

    def select_rows(self, rows: list[int]) -> None:
        """Keep, reorder or repeat rows."""
        if self.store is not None:
            self.store.select_rows(rows)
        elif self.dense is not None:
            self.dense = (self.dense[0][rows], self.dense[1][rows])
        if self.valid is not None:
            self.valid = self.valid[rows]
        self.n_rows = len(rows)

    @staticmethod
    def joined(parts: Sequence[LayerStorage]) -> LayerStorage:
        """The rows of several packed storages, one after the other.

        Raises:
            KvpressError: one of them is not packed yet, or knows of padding.
        """
        first = parts[0]
        stores = [part.store for part in parts if part.store is not None]
        if len(stores) < len(parts) or any(part.valid is not None for part in parts):
            raise KvpressError("only caches whose prompt has been read, without padding, can be joined")
        joined = LayerStorage(sum(part.n_rows for part in parts), first.n_heads, first.packing)
        joined.store = JoinedRows.of(stores)  # type: ignore[arg-type]
        return joined

    def _columns(self, row: int, limit: int) -> Tensor:
        """Columns of a row's real tokens before `limit` (host)."""
        return torch.arange(limit) if self.valid is None else self.valid[row, :limit].nonzero().flatten()


def empty_storage(
    keys: Tensor,
    values: Tensor,
    backend: Backend,
    pool_of: Callable[[torch.device, PageLayout], PagePool],
    formats: Sequence[LayerFormat] = (LayerFormat(),),
    place: int = 0,
) -> LayerStorage:
    """Storage for keys [B, H, n, D] and values like these, which packs as the backend and the format of the layer at `place` say.

    formats: of all layers, for budgets in bytes.
    """
    n_rows, n_heads = keys.shape[:2]
    form, itemsize = formats[place], keys.element_size()
    dims = keys.shape[-1], values.shape[-1]
    head_bytes = tuple(form.token_bytes(pair, itemsize) for pair in form.ranks(dims, n_heads))
    together = [_together(one, pair, backend, keys.dtype) for one in formats for pair in one.ranks(dims, n_heads)]
    page_size, page_bytes = together[0][0], -(-sum(nbytes for _, nbytes in together) // len(together))

    def make_inner(keys: Tensor, values: Tensor, columns: Sequence[Tensor]) -> PackedStore | PagedStore:
        layout = backend.layout(keys.shape[-1], values.shape[-1], form.dtype or keys.dtype)
        if layout is None:
            return PackedStore(keys, values, columns, form.dtype)
        return PagedStore(keys, values, columns, pool_of(keys.device, layout), backend.name)

    def make(keys: Tensor, values: Tensor, columns: Sequence[Tensor]) -> Store:
        if form.projection is None:
            return make_inner(keys, values, columns)
        return ProjectedStore(keys, values, columns, form.projection.to(keys.device), make_inner)

    return LayerStorage(n_rows, n_heads, Packing(make, sum(dims) * itemsize, head_bytes, page_size, page_bytes))


def _together(form: LayerFormat, ranks: tuple[int, int], backend: Backend, dtype: torch.dtype) -> tuple[int, int]:
    """Tokens that a head with these ranks stores together, and their bytes."""
    layout = backend.layout(*ranks, form.dtype or dtype)
    if layout is None:
        return 1, form.token_bytes(ranks, dtype.itemsize)
    return layout.page_size, layout.nbytes + 12  # its place in the page table, and the row's length


def valid_columns(mask: Tensor, n_rows: int) -> Tensor:
    """[B, n] bool on the host: columns that the last query may see, that is, real tokens.

    mask: [B, n] of 0 and 1 (flash), or [B or 1, 1, q, n] as bool or as an additive float mask.
    """
    last = mask if mask.dim() == 2 else mask[:, 0, -1]
    if last.dtype.is_floating_point:
        last = last > torch.finfo(last.dtype).min / 2
    return last.bool().cpu().expand(n_rows, -1)


def own_storage(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a view of a larger storage."""
    own = tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size()
    return tensor if own else tensor.clone()
