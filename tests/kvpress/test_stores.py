"""Every store against a list of lists, under any order of operations, with what is not stored poisoned after each."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvpress.cache.packed import PackedStore
from kvpress.cache.paged import PagedStore
from kvpress_kernels.page_pool import PagePool
from kvpress_kernels.pages import PageLayout, typed, typed_scales
from kvpress_kernels.reference.int8 import dequantise, quantise

HEADS = 2


class Storage(RuleBasedStateMachine):
    """The model: per row a tag, per (row, head) the list of stored columns. The tag changes when a row is copied."""

    dtype = torch.float64
    stored = torch.float64  # of what is stored
    dims = 3, 2

    def content(self, row_tag: int, head: int, column: int) -> tuple[list[float], list[float]]:
        """Key and value of one token: numbers that no other token has."""
        base = 4096.0 * row_tag + 1024 * head + column  # exact in float32
        key_dim, value_dim = self.dims
        return [base + 0.25 * i for i in range(key_dim)], [-base - 0.25 * i for i in range(value_dim)]

    def shown(self, vectors: list[list[float]]) -> list[list[float]]:
        """What a store shows of keys or values."""
        if self.stored != torch.int8 or not vectors:
            return vectors
        shown: list[list[float]] = dequantise(*quantise(torch.tensor(vectors, dtype=self.dtype)), self.dtype).tolist()
        return shown

    def make(self, keys, values, columns):
        raise NotImplementedError

    def poison(self):
        """Overwrite all that is not stored; whoever reads it is found by the next comparison."""
        raise NotImplementedError

    def check(self):
        """What holds for this store alone."""

    def fresh_tag(self) -> int:
        self.last_tag += 1
        return self.last_tag

    def tensors(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense keys [B, H, n, D] and values of the columns self.seen ... self.seen + n."""
        columns = range(self.seen, self.seen + n)
        pairs = [[[self.content(tag, h, c) for c in columns] for h in range(HEADS)] for tag in self.tags]
        keys = torch.tensor([[[k for k, _ in head] for head in row] for row in pairs], dtype=self.dtype)
        values = torch.tensor([[[v for _, v in head] for head in row] for row in pairs], dtype=self.dtype)
        shape = (len(self.tags), HEADS, n)
        return keys.reshape(*shape, self.dims[0]), values.reshape(*shape, self.dims[1])

    @initialize(data=st.data(), n_rows=st.integers(1, 3), n=st.integers(1, 7))
    def pack(self, data, n_rows, n):
        self.last_tag = 0
        self.tags = [self.fresh_tag() for _ in range(n_rows)]
        self.seen = 0
        keys, values = self.tensors(n)
        chosen = [sorted(data.draw(st.sets(st.integers(0, n - 1)))) for _ in range(n_rows * HEADS)]
        self.store = self.make(keys, values, [torch.tensor(c, dtype=torch.long) for c in chosen])
        self.model = [[(self.tags[i // HEADS], c) for c in columns] for i, columns in enumerate(chosen)]
        self.seen = n

    @rule(n=st.integers(1, 20))
    def append(self, n):
        self.store.append(*self.tensors(n), torch.arange(self.seen, self.seen + n))
        for i, segment in enumerate(self.model):
            segment += [(self.tags[i // HEADS], c) for c in range(self.seen, self.seen + n)]
        self.seen += n

    @rule(data=st.data(), n=st.integers(1, 5))
    def append_with_padding(self, data, n):
        mask = st.lists(st.booleans(), min_size=n, max_size=n)
        valid = [data.draw(mask) for _ in self.tags]
        keys, values = self.tensors(n)
        keys[~torch.tensor(valid)[:, None].expand(-1, HEADS, -1)] = float("nan")  # padding holds garbage
        self.store.append(keys, values, torch.arange(self.seen, self.seen + n), torch.tensor(valid))
        for i, segment in enumerate(self.model):
            row = i // HEADS
            segment += [(self.tags[row], self.seen + c) for c in range(n) if valid[row][c]]
        self.seen += n

    @rule(data=st.data())
    def keep(self, data):
        chosen = [sorted(data.draw(st.sets(st.integers(0, len(s) - 1)) if s else st.just(set()))) for s in self.model]
        self.store.keep([torch.tensor(c, dtype=torch.long) for c in chosen])
        self.model = [[segment[c] for c in at] for segment, at in zip(self.model, chosen, strict=True)]
        self.after_keep()

    @rule(back=st.integers(0, 6))
    def truncate(self, back):
        self.seen = max(self.seen - back, 0)
        self.store.truncate(self.seen)
        self.model = [[(tag, c) for tag, c in segment if c < self.seen] for segment in self.model]

    @rule(data=st.data(), n_rows=st.integers(1, 4))
    def select_rows(self, data, n_rows):
        rows = data.draw(st.lists(st.integers(0, len(self.tags) - 1), min_size=n_rows, max_size=n_rows))
        self.store.select_rows(rows)
        self.model = [list(self.model[row * HEADS + head]) for row in rows for head in range(HEADS)]
        self.tags = [self.fresh_tag() for _ in rows]  # what a copy appends from now on is its own

    @invariant()
    def same_as_the_model(self):
        if not hasattr(self, "model"):
            return
        store = self.store
        assert store.n_rows == len(self.tags)
        assert store.lengths == [len(segment) for segment in self.model]
        for i, (expected, (keys, values, positions)) in enumerate(zip(self.model, store.segments(), strict=True)):
            assert positions.tolist() == [c for _, c in expected]
            stored = [self.content(tag, i % HEADS, c) for tag, c in expected]
            assert keys.tolist() == self.shown([k for k, _ in stored])
            assert values.tolist() == self.shown([v for _, v in stored])

    @invariant()
    def bytes_are_real(self):
        if not hasattr(self, "model"):
            return
        self.check()
        store = self.store
        assert store.token_bytes == sum(self.dims) * self.stored.itemsize + 4 + 4 * (self.stored == torch.int8)
        for length, room in zip(store.lengths, store.room, strict=True):
            assert length <= room
        self.poison()


class PackedStorage(Storage):
    def make(self, keys, values, columns):
        store = PackedStore(keys, values, columns, None if self.stored == self.dtype else self.stored)
        assert store.room == store.lengths  # a fresh store has no slack
        return store

    def after_keep(self):
        assert self.store.room == self.store.lengths  # what was evicted is gone, and so is the slack

    def check(self):
        store = self.store
        buffers = (store.keys, store.values, store.positions, store.key_scales, store.value_scales)
        assert store.nbytes == sum(t.untyped_storage().nbytes() for t in buffers if t is not None)
        assert store.nbytes == sum(store.room) * store.token_bytes
        ends = [s + room for s, room in zip(store.starts, store.room, strict=True)]
        assert store.starts == [0, *ends[:-1]]
        assert ends[-1] == store.keys.shape[0]

    def poison(self):
        store = self.store
        for start, length, room in zip(store.starts, store.lengths, store.room, strict=True):
            slack = slice(start + length, start + room)
            store.positions[slack] = -(10**6)
            held = (store.keys, store.values) if store.key_scales is None else (store.key_scales, store.value_scales)
            for buffer in held:
                buffer[slack] = float("nan")


class PagedStorage(Storage):
    """A second store on the same pool must not notice what the first one does."""

    backend = "torch"
    page_size = 4

    def make(self, keys, values, columns):
        key_dim, value_dim = self.dims
        self.pool = PagePool(PageLayout(self.page_size, key_dim, value_dim, self.stored), "cpu")
        other = [torch.arange(3)] * HEADS
        tokens = torch.arange(HEADS * 3 * max(self.dims), dtype=self.dtype).view(1, HEADS, 3, -1)
        self.neighbour = PagedStore(tokens[..., :key_dim], tokens[..., :value_dim], other, self.pool, self.backend)
        self.neighbour_keys = [self.neighbour.segment(head)[0] for head in range(HEADS)]
        return PagedStore(keys, values, columns, self.pool, self.backend)

    def after_keep(self):
        pages = [-(-n // self.page_size) for n in self.store.lengths]
        assert self.store.room == [n * self.page_size for n in pages]  # surplus pages are free

    def check(self):
        store = self.store
        assert store.device_lengths.tolist() == store.lengths
        assert store.nbytes + self.neighbour.nbytes + self.pool.idle_bytes == self.pool.nbytes + sum(
            table.nbytes for s in (store, self.neighbour) for table in (s.table.device, s.device_lengths)
        )
        assert self.pool.nbytes == sum(slab.untyped_storage().nbytes() for slab in self.pool.pages.slabs)
        for head in range(HEADS):
            assert torch.equal(self.neighbour.segment(head)[0], self.neighbour_keys[head])

    def poison(self):
        stored = {}
        for store in (self.store, self.neighbour):
            for row, length in enumerate(store.lengths):
                for page, entry in enumerate(store.table.row(row, -(-length // self.page_size)).tolist()):
                    # a page that rows share holds as much as the longest of them stores
                    n = min(length - page * self.page_size, self.page_size)
                    stored[entry] = max(n, stored.get(entry, 0))
        for slab in self.pool.pages.slabs:
            first = (slab.data_ptr() - self.pool.pages.anchor.data_ptr()) // 16
            views = typed(slab, self.pool.layout)
            for index in range(slab.shape[0]):
                used = stored.get(first + index * self.pool.layout.nbytes // 16, 0)
                views.positions[index, used:] = -(10**6)
                if self.stored == torch.int8:
                    typed_scales(slab, self.pool.layout)[index, used:] = float("nan")
                else:
                    views.keys[index, used:], views.values[index, used:] = float("nan"), float("nan")

    @rule()
    def move_pages(self):
        """Defragmentation and more pages in between change tables, never what is stored."""
        if hasattr(self, "pool"):
            self.pool.release(self.pool.allocate(5))
            self.pool.defragment()


class PagedStorageInTriton(PagedStorage):
    """The same through the kernels, in the interpreter."""

    backend = "triton"
    dtype = stored = torch.float32
    page_size = 16


class PackedStorageInInt8(PackedStorage):
    stored = torch.int8


class PagedStorageInInt8(PagedStorage):
    stored = torch.int8


class PagedStorageInTritonInInt8(PagedStorageInTriton):
    stored = torch.int8
    dims = 4, 8


TestPacked = PackedStorage.TestCase
TestPacked.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestPaged = PagedStorage.TestCase
TestPaged.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestPagedInTriton = PagedStorageInTriton.TestCase
TestPagedInTriton.settings = settings(max_examples=4, stateful_step_count=12, deadline=None)
TestPackedInInt8 = PackedStorageInInt8.TestCase
TestPackedInInt8.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
TestPagedInInt8 = PagedStorageInInt8.TestCase
TestPagedInInt8.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestPagedInTritonInInt8 = PagedStorageInTritonInInt8.TestCase
TestPagedInTritonInInt8.settings = settings(max_examples=4, stateful_step_count=12, deadline=None)
