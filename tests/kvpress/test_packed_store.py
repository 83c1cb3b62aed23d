"""PackedStore against a list of lists, under any order of operations, with the slack poisoned after each of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvpress.cache.packed import MIN_SLACK, PackedStore

HEADS, DIM, VALUE_DIM = 2, 3, 2


def content(row_tag: int, head: int, column: int) -> tuple[list[float], list[float]]:
    """Key and value of one token: numbers that no other token has."""
    base = 1e6 * row_tag + 1e4 * head + column
    return [base + 0.1 * i for i in range(DIM)], [-base - 0.1 * i for i in range(VALUE_DIM)]


class Storage(RuleBasedStateMachine):
    """The model: per row a tag, per (row, head) the list of stored columns. The tag changes when a row is copied."""

    def fresh_tag(self) -> int:
        self.last_tag += 1
        return self.last_tag

    def tensors(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense keys [B, H, n, D] and values of the columns self.seen ... self.seen + n."""
        columns = range(self.seen, self.seen + n)
        pairs = [[[content(tag, h, c) for c in columns] for h in range(HEADS)] for tag in self.tags]
        keys = torch.tensor([[[k for k, _ in head] for head in row] for row in pairs], dtype=torch.float64)
        values = torch.tensor([[[v for _, v in head] for head in row] for row in pairs], dtype=torch.float64)
        shape = (len(self.tags), HEADS, n)
        return keys.reshape(*shape, DIM), values.reshape(*shape, VALUE_DIM)

    @initialize(data=st.data(), n_rows=st.integers(1, 3), n=st.integers(1, 7))
    def pack(self, data, n_rows, n):
        self.last_tag = 0
        self.tags = [self.fresh_tag() for _ in range(n_rows)]
        self.seen = 0
        keys, values = self.tensors(n)
        chosen = [sorted(data.draw(st.sets(st.integers(0, n - 1)))) for _ in range(n_rows * HEADS)]
        self.store = PackedStore(keys, values, [torch.tensor(c, dtype=torch.long) for c in chosen])
        self.model = [[(self.tags[i // HEADS], c) for c in columns] for i, columns in enumerate(chosen)]
        self.seen = n
        assert self.store.room == self.store.lengths  # a fresh store has no slack

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
        assert self.store.room == self.store.lengths  # what was evicted is gone, and so is the slack

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
            stored = [content(tag, i % HEADS, c) for tag, c in expected]
            assert keys.tolist() == [k for k, _ in stored]
            assert values.tolist() == [v for _, v in stored]

    @invariant()
    def bytes_are_real(self):
        if not hasattr(self, "model"):
            return
        store = self.store
        buffers = (store.keys, store.values, store.positions)
        assert store.nbytes == sum(t.untyped_storage().nbytes() for t in buffers)
        assert store.token_bytes == (DIM + VALUE_DIM) * 8 + 4
        assert store.nbytes == sum(store.room) * store.token_bytes
        for length, room in zip(store.lengths, store.room, strict=True):
            assert length <= room

    @invariant()
    def segments_do_not_overlap(self):
        if not hasattr(self, "model"):
            return
        ends = [s + room for s, room in zip(self.store.starts, self.store.room, strict=True)]
        assert self.store.starts == [0, *ends[:-1]]
        assert ends[-1] == self.store.keys.shape[0]

    @invariant()
    def poison_the_slack(self):
        """Whatever reads a token that is not stored reads NaN; the next comparison finds it."""
        if not hasattr(self, "model"):
            return
        store = self.store
        for start, length, room in zip(store.starts, store.lengths, store.room, strict=True):
            slack = slice(start + length, start + room)
            store.keys[slack], store.values[slack], store.positions[slack] = float("nan"), float("nan"), -(10**6)


TestStorage = Storage.TestCase
TestStorage.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def store_of(lengths: list[int], n: int = 40) -> PackedStore:
    keys = torch.randn(len(lengths) // HEADS, HEADS, n, DIM)
    values = torch.randn(len(lengths) // HEADS, HEADS, n, VALUE_DIM)
    return PackedStore(keys, values, [torch.arange(m) for m in lengths])


def test_ragged_heads_are_not_padded_to_the_longest():
    store = store_of([40, 1, 0, 3])
    assert store.keys.shape == (44, DIM)
    assert store.nbytes == 44 * ((DIM + VALUE_DIM) * 4 + 4)


def test_a_full_segment_grows_gets_room_for_the_next_tokens():
    """So that decoding does not copy the cache at every step; the slack is bounded."""
    store = store_of([40, 2])
    new = torch.randn(1, HEADS, 1, DIM), torch.randn(1, HEADS, 1, VALUE_DIM)
    store.append(*new, torch.tensor([40]))
    assert store.room == [41 + MIN_SLACK, 3 + MIN_SLACK]
    where = store.keys.data_ptr()
    for column in range(41, 41 + MIN_SLACK):
        store.append(*new, torch.tensor([column]))
    assert store.keys.data_ptr() == where
    assert store.lengths == store.room
    long = PackedStore(torch.randn(1, 1, 3200, 1), torch.randn(1, 1, 3200, 1), [torch.arange(3200)])
    long.append(torch.randn(1, 1, 1, 1), torch.randn(1, 1, 1, 1), torch.tensor([3200]))
    assert long.room == [3201 + 200]


def test_repeated_rows_are_copies():
    """Beams that share a past must not write into each other."""
    store = store_of([3, 3])
    store.select_rows([0, 0])
    keys = torch.stack([torch.full((HEADS, 1, DIM), 1.0), torch.full((HEADS, 1, DIM), 2.0)])
    store.append(keys, keys[..., :VALUE_DIM], torch.tensor([40]))
    last = [segment[0][-1].tolist() for segment in store.segments()]
    assert last == [[1.0] * DIM] * 2 + [[2.0] * DIM] * 2


def test_selecting_the_rows_as_they_are_moves_nothing():
    store = store_of([3, 1, 4, 2])
    where = store.keys.data_ptr()
    store.select_rows([0, 1])
    assert store.keys.data_ptr() == where


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(dtype):
    keys, values = torch.randn(1, HEADS, 4, DIM).to(dtype), torch.randn(1, HEADS, 4, VALUE_DIM).to(dtype)
    store = PackedStore(keys, values, [torch.tensor([1, 3])] * HEADS)
    store.append(keys[:, :, :1], values[:, :, :1], torch.tensor([4]))
    assert store.keys.dtype == store.values.dtype == dtype
    assert store.positions.dtype == torch.int32
    assert torch.equal(store.segment(1)[0], keys[0, 1][torch.tensor([1, 3, 0])])
