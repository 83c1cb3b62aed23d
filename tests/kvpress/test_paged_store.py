"""PagedStore: whole pages move no bytes, free pages are reused, slabs go back, rows share pages until they differ."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from generation_support import kept
from tiny_models import prompts, tiny

import kvpress
from kvpress.backend import BackendRequest
from kvpress.cache.paged import PagedStore
from kvpress_kernels.page_pool import PagePool
from kvpress_kernels.pages import PageLayout

HEADS, DIM, VALUE_DIM, PAGE = 2, 5, 3, 4
GREEDY = {"do_sample": False, "pad_token_id": 0}


def store_of(lengths, n=40, pool=None):
    pool = pool or PagePool(PageLayout(PAGE, DIM, VALUE_DIM, torch.float32), "cpu")
    keys = torch.randn(len(lengths) // HEADS, HEADS, n, DIM)
    store = PagedStore(keys, keys[..., :VALUE_DIM] + 1, [torch.arange(m) for m in lengths], pool, "torch")
    return store, keys


def new_token(column, n_rows=1, value=0.0):
    keys = torch.full((n_rows, HEADS, 1, DIM), value)
    return keys, keys[..., :VALUE_DIM], torch.tensor([column])


def entries(store):
    return [store.table.row(row, -(-n // PAGE)).tolist() for row, n in enumerate(store.lengths)]


def test_a_row_takes_as_many_pages_as_it_needs():
    store, _ = store_of([9, 4, 0, 1])
    assert [len(row) for row in entries(store)] == [3, 1, 0, 1]
    assert store.table.pool.n_pages == 5
    assert store.nbytes == 5 * store.table.pool.layout.nbytes + store.table.device.nbytes + 4 * 4


def test_evicting_whole_pages_moves_no_bytes(monkeypatch):
    store, keys = store_of([16, 14])
    before = entries(store)
    monkeypatch.setattr(PagedStore, "_op", None)  # no op runs
    store.keep([torch.tensor([0, 1, 2, 3, 8, 9, 10, 11]), torch.tensor([4, 5, 6, 7, 12, 13])])
    assert entries(store) == [[before[0][0], before[0][2]], [before[1][1], before[1][3]]]
    assert store.table.pool.n_pages - store.table.pool.n_free == 4
    assert torch.equal(store.segment(1)[0], keys[0, 1, [4, 5, 6, 7, 12, 13]])
    assert store.segment(1)[2].tolist() == [4, 5, 6, 7, 12, 13]


@pytest.mark.parametrize("index", [[0, 1, 2, 4, 5, 6, 7], [0, 1, 12, 13], [13], []])
def test_anything_else_is_compacted(index):
    store, keys = store_of([14, 14])
    store.keep([torch.tensor(index, dtype=torch.long), torch.arange(14)])
    assert torch.equal(store.segment(0)[0], keys[0, 0, index])
    assert torch.equal(store.segment(1)[0], keys[0, 1, :14])
    assert store.room[0] == -(-len(index) // PAGE) * PAGE


def test_a_short_page_that_stays_in_the_middle_is_compacted():
    """The next token goes behind the last one; a gap inside a row would be read as tokens."""
    store, keys = store_of([6, 6])
    store.append(*new_token(6, value=7.0))
    store.truncate(6)
    store.keep([torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5])])
    store.append(*new_token(6, value=9.0))
    assert store.segment(0)[2].tolist() == [0, 1, 2, 3, 6]
    assert store.segment(1)[2].tolist() == [4, 5, 6]
    assert store.segment(1)[0][-1].tolist() == [9.0] * DIM
    assert torch.equal(store.segment(1)[0][:2], keys[0, 1, 4:6])


def test_freed_pages_serve_another_layer():
    pool = PagePool(PageLayout(PAGE, DIM, VALUE_DIM, torch.float32), "cpu")
    first, _ = store_of([16, 16], pool=pool)
    size = pool.nbytes
    first.keep([torch.arange(8), torch.arange(12)])
    second, keys = store_of([8, 4], pool=pool)
    assert pool.nbytes == size
    assert pool.n_free == 0
    assert torch.equal(second.segment(0)[0], keys[0, 0, :8])
    assert first.lengths == [8, 12]


def test_the_table_changes_once_in_a_page_of_steps():
    store, _ = store_of([9, 4])
    versions, addresses = set(), set()
    for column in range(40, 40 + 8 * PAGE):
        store.append(*new_token(column))
        versions.add(store.table.version)
        addresses.add(store.table.device.data_ptr())
    assert len(versions) <= 9
    assert len(addresses) <= 5  # only where rows outgrow the width of the table
    assert all(room - n <= 2 * PAGE for room, n in zip(store.room, store.lengths, strict=True))


def test_repeated_rows_share_pages_until_they_write():
    store, keys = store_of([9, 4])
    pages = store.table.pool.n_pages
    store.select_rows([0, 0, 0])
    assert store.table.pool.n_pages - store.table.pool.n_free == pages
    store.append(*[part.repeat(3, 1, 1, 1) if part.dim() == 4 else part for part in new_token(40)])
    used = entries(store)
    assert used[0][:2] == used[2][:2] == used[4][:2]  # full pages stay shared
    assert len({used[0][2], used[2][2], used[4][2]}) == 3  # the page that was written is each row's own
    for row in range(0, 6, 2):
        assert torch.equal(store.segment(row)[0][:9], keys[0, 0, :9])
    store.select_rows([1])
    assert store.table.pool.n_pages - store.table.pool.n_free == sum(map(len, entries(store)))


def test_a_shared_row_that_is_cut_back_and_written_leaves_the_others_alone():
    store, keys = store_of([12, 12])
    store.select_rows([0, 0])
    store.truncate(2)
    tokens = torch.randn(2, HEADS, 6, DIM)
    store.append(tokens, tokens[..., :VALUE_DIM], torch.arange(2, 8))
    for row in range(4):
        assert torch.equal(store.segment(row)[0], torch.cat([keys[0, row % 2, :2], tokens[row // 2, row % 2]]))


def test_slabs_go_back_to_the_allocator_after_an_eviction():
    """The bytes of the storages that are alive, not of what the pool believes."""
    model = tiny("llama")
    contract = kvpress.Contract.load("snapkv", 0.25).swap(
        query_law={"kind": "first_decode_steps", "n": 2}, schedule={"kind": "after_decode_steps", "n": 2}
    )
    ids, _ = prompts(1, 800)
    request = BackendRequest("torch", "paged", 16)
    with torch.no_grad(), kvpress.CompressedCache(model, contract, backend=request) as cache:
        model(input_ids=ids, past_key_values=cache)
        (pool,) = cache.plan.pools.values()
        slabs = [weakref.ref(slab.untyped_storage()) for slab in pool.pages.slabs]
        before = pool.nbytes
        assert before >= 3 * 2 * 800 * pool.layout.token_bytes
        for _ in range(4):
            model(input_ids=ids[:, :1], past_key_values=cache)
        gc.collect()
        alive = sum(storage().nbytes() for storage in slabs if storage() is not None)
        assert alive <= pool.nbytes <= 0.5 * before  # a quarter, pages ahead, and room to stay away from thrashing
        assert cache.nbytes <= pool.nbytes + 3 * 10_000


def test_the_cache_gives_all_pages_back():
    model = tiny("llama")
    cache = kvpress.CompressedCache(model, "snapkv", budget=0.5, backend=BackendRequest("torch", "paged"))
    with torch.no_grad(), cache:
        model(input_ids=prompts(1, 100)[0], past_key_values=cache)
        slabs = [weakref.ref(slab) for pool in cache.plan.pools.values() for slab in pool.pages.slabs]
        assert slabs
        cache.reset()
        assert all(slab() is None for slab in slabs)
        assert cache.nbytes == 0


@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_every_page_size_gives_the_packed_tokens(page_size):
    model = tiny("qwen3")
    ids, mask = prompts(2, 100, [31, 0])
    results = []
    for request in (BackendRequest("torch", "packed"), BackendRequest("torch", "paged", page_size)):
        with kvpress.compress(model, "adakv", budget=0.5, backend=request) as session:
            tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=40, **GREEDY)
        results.append((tokens, kept(session)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_blocks_as_large_as_a_page_are_evicted_without_a_move(monkeypatch):
    """With strict blocks of a page every eviction while decoding only edits tables."""
    model = tiny("llama")
    contract = kvpress.Contract.load("mii_blocks", 0.5).swap(
        schedule={"kind": "every_decode_steps", "n": 8},
        budget={"kind": "tokens", "value": 64},
        granularity={"kind": "block", "size": 16},
        query_law={"kind": "tail", "window": 8},
    )
    moves, real = [], PagedStore._op

    def counted(self, name):
        moves.append(name)
        return real(self, name)

    monkeypatch.setattr(PagedStore, "_op", counted)
    with kvpress.compress(model, contract, backend=BackendRequest("torch", "paged", 16)) as session:
        model.generate(input_ids=prompts(1, 160)[0], max_new_tokens=60, **GREEDY)
    assert "compact" not in moves
    assert moves.count("gather_pages") == 3
    assert max(max(layer.storage.store.lengths) for layer in session.cache.compressed_layers) <= 64 + 8 + 16


def test_uneven_heads_are_decoded_from_a_work_list(monkeypatch):
    """The list covers all pages, follows the table in the same tensors, and changes no result."""
    import kvpress_kernels.work_list as module

    monkeypatch.setattr(module, "MIN_TOKENS", 1)
    pool = PagePool(PageLayout(16, 16, 16, torch.float32), "cpu")
    keys, values = torch.randn(1, 2, 200, 16), torch.randn(1, 2, 200, 16)
    store = PagedStore(keys, values, [torch.arange(200), torch.arange(20)], pool, "triton")
    reference = PagedStore(keys, values, [torch.arange(200), torch.arange(20)], pool, "torch")
    addresses = set()
    for column in range(200, 235):
        token = torch.randn(1, 2, 1, 16)
        for one in (store, reference):
            one.append(token, token, torch.tensor([column]))
        addresses.add(store.addresses())
    assert store.work_list() is not None
    query = torch.randn(1, 2, 3, 16)
    torch.testing.assert_close(store.decode(query, scale=0.25), reference.decode(query, scale=0.25))
    assert len(addresses) <= 3, "the table outgrew its width; the list itself stayed where it was"


def test_a_deep_copy_has_pages_of_its_own():
    """transformers' way to reuse a prefix: read once, copy the cache for every continuation."""
    model, ids = tiny("llama"), prompts(1, 60)[0]
    request = BackendRequest("torch", "paged", 16)
    with torch.no_grad(), kvpress.CompressedCache(model, "adakv", budget=0.6, backend=request) as cache:
        model(input_ids=ids, past_key_values=cache)
        copied = copy.deepcopy(cache)
        before = [part.clone() for part in cache.compressed_layers[0].storage.store.segment(1)]
        model(input_ids=ids[:, :5], past_key_values=copied)
        expected = model(input_ids=ids[:, :5], past_key_values=copy.deepcopy(cache)).logits
        after = cache.compressed_layers[0].storage.store.segment(1)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert torch.equal(expected, model(input_ids=ids[:, :5], past_key_values=cache).logits)
        (mine,), (theirs,) = cache.plan.pools.values(), copied.plan.pools.values()
        assert {slab.data_ptr() for slab in mine.pages.slabs}.isdisjoint(slab.data_ptr() for slab in theirs.pages.slabs)


def test_a_store_that_goes_gives_its_pages_back():
    store, _ = store_of([16, 16])
    pool = store.table.pool
    del store
    assert pool.n_free == pool.n_pages


def test_a_store_that_cannot_be_made_leaves_no_pages_behind(monkeypatch):
    def failing(self, name):
        raise RuntimeError("out of memory")

    pool = PagePool(PageLayout(PAGE, DIM, VALUE_DIM, torch.float32), "cpu")
    monkeypatch.setattr(PagedStore, "_op", failing)
    with pytest.raises(RuntimeError):
        store_of([16, 16], pool=pool)
    gc.collect()
    assert pool.n_free == pool.n_pages


def test_fewer_rows_give_memory_back():
    store, _ = store_of([16] * 16)
    pool = store.table.pool
    store.select_rows([3])
    assert pool.n_pages == 8
    assert store.nbytes < 9 * pool.layout.nbytes + 200


def test_shared_pages_count_once():
    store, _ = store_of([16, 10])
    single = store.index_bytes - store.table.nbytes, store.slack_bytes, store.table.page_bytes
    store.select_rows([0] * 20)
    assert store.table.page_bytes == single[2]
    assert store.slack_bytes == single[1]
    assert store.index_bytes - store.table.nbytes - store.device_lengths.nbytes == 4 * 26


def test_the_full_size_in_a_report_is_transformers_own():
    model, ids = tiny("llama"), prompts(4, 60)[0]
    sizes = []
    for request in (BackendRequest("torch", "packed"), BackendRequest("torch", "paged", 16)):
        with torch.no_grad(), kvpress.CompressedCache(model, "adakv", budget=0.6, backend=request) as cache:
            model(input_ids=ids, past_key_values=cache)
            cache.batch_select_indices(torch.tensor([1]))
            sizes.append(cache.report().to_dict()["full_bytes"])
    assert sizes == [60 * 3 * 2 * 2 * 16 * 4] * 2


def test_a_failed_move_of_pages_changes_nothing(monkeypatch):
    pool = PagePool(PageLayout(PAGE, DIM, VALUE_DIM, torch.float32), "cpu")
    stores = [store_of([16, 16], pool=pool) for _ in range(4)]
    for store, _ in stores:
        monkeypatch.setattr(pool, "tidy", lambda: None)
        store.keep([torch.arange(4), torch.arange(4)])
    counts = pool.n_pages, pool.n_free

    def failing(source, target):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(pool.pages, "copy", failing)
        with pytest.raises(torch.OutOfMemoryError):
            pool.defragment()
    assert (pool.n_pages, pool.n_free) == counts
    pool.defragment()
    assert pool.n_pages <= 2 * 8
    for store, keys in stores:
        assert torch.equal(store.segment(0)[0], keys[0, 0, :4])


def test_one_large_sparse_slab_shrinks():
    store, keys = store_of([40] * 40)
    pool = store.table.pool
    store.keep([torch.arange(4)] * 40)
    assert pool.n_pages == 40
    assert torch.equal(store.segment(7)[0], keys[3, 1, :4])


def test_bytes_of_eight_bits_are_those_of_codes_scales_and_positions():
    pool = PagePool(PageLayout(16, 24, 40, torch.int8), "cpu")
    assert (pool.layout.scale_offset, pool.layout.position_offset) == (16 * 64, 16 * 64 + 16 * 4)
    assert pool.layout.nbytes == 16 * (24 + 40 + 4 + 4)
    assert pool.layout.token_bytes == 24 + 40 + 4 + 4
    keys = torch.randn(1, 2, 30, 40, dtype=torch.bfloat16)
    store = PagedStore(keys[..., :24], keys, [torch.arange(30), torch.arange(16)], pool, "torch")
    assert store.nbytes == 3 * pool.layout.nbytes + store.table.device.nbytes + 2 * 4
    assert store.slack_bytes == 2 * pool.layout.token_bytes
    shown = store.segment(1)
    assert (shown[0].dtype, shown[1].shape) == (torch.bfloat16, (16, 40))


def test_a_budget_in_bytes_counts_pages_of_eight_bits():
    model, ids, budget = tiny("llama"), prompts(1, 400)[0], 30_000
    kept = {}
    for representation in ("model", "int8"):
        contract = kvpress.Contract.load("snapkv", f"{budget}B").swap(representation=representation)
        request = BackendRequest("torch", "paged", 16)
        with torch.no_grad(), kvpress.CompressedCache(model, contract, backend=request) as cache:
            model(input_ids=ids, past_key_values=cache)
            stores = [layer.storage.store for layer in cache.compressed_layers]
            assert 0.8 * budget < sum(store.nbytes for store in stores) <= budget
            kept[representation] = sum(stores[0].lengths)
    assert kept["int8"] > 2.5 * kept["model"]  # float32


@pytest.mark.parametrize("name", ["snapkv", "mii", "h2o", "adakv", "tova", "criticalkv", "streaming_llm"])
@pytest.mark.parametrize("while_decoding", [False, True])
def test_eight_bits_in_pages_are_the_packed_eight_bits(name, while_decoding):
    """Every selector keeps the same tokens and gives the same text, also where it reads what is stored."""
    model, (ids, mask), results = tiny("llama", torch.float64), prompts(2, 60, [13, 0]), []
    contract = kvpress.Contract.load(name, 0.7).swap(representation="int8")
    if while_decoding:
        contract = contract.swap(schedule={"kind": "every_decode_steps", "n": 3})
    for request in (BackendRequest("torch", "packed"), BackendRequest("torch", "paged", 16)):
        with kvpress.compress(model, contract, backend=request) as session:
            tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, **GREEDY)
        results.append((tokens, kept(session)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
