"""PackedStore: no padding, bounded slack, and copies where rows are repeated. `test_stores.py` has the properties."""

from __future__ import annotations

import pytest
import torch

from kvpress.cache.packed import MIN_SLACK, PackedStore

HEADS, DIM, VALUE_DIM = 2, 3, 2


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
