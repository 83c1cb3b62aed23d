"""Pages and their pool: content survives, free pages are reused, slabs really go."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvpress_kernels.page_pool import PagePool
from kvpress_kernels.pages import UNIT_BYTES, PageLayout, Pages, typed

LAYOUT = PageLayout(page_size=4, key_dim=5, value_dim=3, dtype=torch.float32)


class Owner:
    """A page table of one column, as the pool sees it."""

    def __init__(self, pool):
        self.pool, self.entries = pool, np.empty(0, np.int64)
        pool.register(self.remap)

    def remap(self, old, new):
        place = np.searchsorted(old, self.entries).clip(max=len(old) - 1)
        self.entries = np.where(old[place] == self.entries, new[place], self.entries)

    def add(self, n, tags):
        fresh = self.pool.allocate(n)
        self.entries = np.concatenate([self.entries, fresh])
        keys = torch.tensor(tags, dtype=torch.float32)[:, None].expand(-1, LAYOUT.key_dim)
        zeros = torch.zeros(n, dtype=torch.long)
        self.pool.pages.write(torch.from_numpy(fresh), zeros, keys, keys[:, : LAYOUT.value_dim] + 0.5, zeros + 7)


class Pool(RuleBasedStateMachine):
    """Two tables over one pool, against lists of tags."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(LAYOUT, "cpu")
        self.owners = [Owner(self.pool), Owner(self.pool)]
        self.tags = [[], []]
        self.next_tag = 0

    @rule(which=st.integers(0, 1), n=st.integers(1, 9))
    def allocate(self, which, n):
        fresh = list(range(self.next_tag, self.next_tag + n))
        self.next_tag += n
        self.owners[which].add(n, fresh)
        self.tags[which] += fresh

    @rule(which=st.integers(0, 1), data=st.data())
    def release(self, which, data):
        size = len(self.tags[which])
        drop = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=bool)
        owner = self.owners[which]
        self.pool.release(owner.entries[drop])
        owner.entries = owner.entries[~drop]
        self.tags[which] = [tag for tag, gone in zip(self.tags[which], drop, strict=True) if not gone]

    @rule(which=st.integers(0, 1))
    def share(self, which):
        """The other table gets all pages of this one."""
        owner, other = self.owners[which], self.owners[1 - which]
        self.pool.share(owner.entries)
        other.entries = np.concatenate([other.entries, owner.entries])
        self.tags[1 - which] += self.tags[which]

    @rule()
    def tidy(self):
        self.pool.tidy()
        assert self.pool.n_free <= max(self.pool.n_pages / 2, max([s.shape[0] for s in self.pool.pages.slabs] or [0]))

    @rule()
    def defragment(self):
        self.pool.defragment()

    @invariant()
    def content_is_there(self):
        for owner, tags in zip(self.owners, self.tags, strict=True):
            found = self.pool.pages.read(torch.from_numpy(owner.entries))
            assert found.keys[:, 0, 0].tolist() == tags
            assert found.values[:, 0, -1].tolist() == [tag + 0.5 for tag in tags]
            assert found.positions[:, 0].tolist() == [7] * len(tags)

    @invariant()
    def counts_add_up(self):
        everything = np.concatenate([owner.entries for owner in self.owners])
        pages, counts = np.unique(everything, return_counts=True)
        assert self.pool.uses(pages).tolist() == counts.tolist()
        assert self.pool.n_pages - self.pool.n_free == len(pages)
        assert self.pool.nbytes == self.pool.n_pages * LAYOUT.nbytes
        assert self.pool.idle_bytes == self.pool.n_free * LAYOUT.nbytes


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_free_pages_are_used_before_a_new_slab():
    pool = PagePool(LAYOUT, "cpu")
    first = pool.allocate(10)
    size = pool.nbytes
    pool.release(first[3:8])
    again = pool.allocate(5)
    assert sorted(again) == sorted(first[3:8])
    assert pool.nbytes == size


def test_empty_slabs_go_back_to_the_allocator():
    pool = PagePool(LAYOUT, "cpu")
    kept, gone = pool.allocate(4), pool.allocate(40)
    storages = [weakref.ref(slab.untyped_storage()) for slab in pool.pages.slabs]
    assert len(storages) == 2
    pool.release(gone)
    pool.tidy()
    gc.collect()
    assert pool.nbytes == 4 * LAYOUT.nbytes
    assert sum(storage() is not None for storage in storages) <= 1
    pool.release(kept)
    pool.tidy()
    assert pool.nbytes == 0
    assert pool.pages.slabs == []


def test_defragmentation_frees_half_empty_slabs():
    """Every layer's slab lost three quarters of its pages: what is left fits into one."""
    pool = PagePool(LAYOUT, "cpu")
    owners = [Owner(pool) for _ in range(4)]
    for index, owner in enumerate(owners):
        owner.add(8, range(8 * index, 8 * index + 8))
    for owner in owners:
        pool.release(owner.entries[2:])
        owner.entries = owner.entries[:2]
    pool.tidy()
    assert pool.n_pages == 8
    assert pool.n_free == 0
    for index, owner in enumerate(owners):
        assert pool.pages.read(torch.from_numpy(owner.entries)).keys[:, 0, 0].tolist() == [8 * index, 8 * index + 1]


def test_the_number_of_slabs_stays_small():
    pool = PagePool(LAYOUT, "cpu")
    for _ in range(1000):
        pool.allocate(1)
    assert len(pool.pages.slabs) < 100
    assert pool.n_free <= 1000 / 16


def test_releasing_too_often_is_an_error():
    pool = PagePool(LAYOUT, "cpu")
    entries = pool.allocate(2)
    pool.release(entries)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(entries[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("page", "key_dim", "value_dim"), [(16, 128, 128), (32, 80, 64), (64, 5, 3), (16, 1, 1)])
def test_the_parts_of_a_page_do_not_overlap(dtype, page, key_dim, value_dim):
    layout = PageLayout(page, key_dim, value_dim, dtype)
    raw = torch.zeros((3, layout.nbytes), dtype=torch.uint8)
    views = typed(raw, layout)
    for number, view in enumerate(views, start=1):
        view[1] = number
    assert [view[1].unique().tolist() for view in views] == [[1], [2], [3]]
    assert not raw[0].any()
    assert not raw[2].any()
    for offset in (layout.value_offset, layout.position_offset, layout.nbytes):
        assert offset % UNIT_BYTES == 0
    assert layout.nbytes >= page * layout.token_bytes
    assert layout.nbytes < page * layout.token_bytes + 128


def test_entries_find_pages_in_several_slabs():
    pages = Pages(LAYOUT, "cpu")
    entries = torch.cat([pages.add_slab(3), pages.add_slab(5)])
    chosen = entries[torch.randperm(8)]
    keys = torch.randn(8, LAYOUT.key_dim)
    pages.write(chosen, torch.arange(8) % 4, keys, keys[:, :3], torch.arange(8))
    found = pages.read(chosen)
    assert torch.equal(found.keys[torch.arange(8), torch.arange(8) % 4], keys)
    assert torch.equal(found.positions[torch.arange(8), torch.arange(8) % 4], torch.arange(8, dtype=torch.int32))


def test_rocm_addresses_pages_with_64_bits():
    """Triton takes small tensors on ROCm for ones that 32-bit offsets cover; pages lie anywhere from the anchor."""
    amd = pytest.importorskip("triton.backends.amd.compiler")
    assert amd.HIPBackend.is_within_2gb(torch.zeros(16))
    assert not amd.HIPBackend.is_within_2gb(Pages(LAYOUT, "cpu").anchor)


def test_pages_of_several_layouts_count_from_one_anchor():
    """An entry is a distance in bytes: the pages of either layout are found from the other's anchor."""
    narrow = PagePool(PageLayout(4, 8, 8, torch.float32), "cpu")
    wide = PagePool(PageLayout(4, 24, 16, torch.float32), "cpu", anchor=narrow.pages.anchor)
    assert wide.pages.anchor is narrow.pages.anchor
    for pool in (narrow, wide):
        entries = torch.from_numpy(pool.allocate(3))
        slot = torch.zeros(3, dtype=torch.long)
        keys = torch.randn(3, pool.layout.key_dim)
        pool.pages.write(entries, slot, keys, keys[:, :8].repeat(1, 2)[:, : pool.layout.value_dim], slot)
        (slab,) = pool.pages.slabs
        addresses = narrow.pages.anchor.data_ptr() + UNIT_BYTES * entries
        assert sorted(addresses.tolist()) == [slab[i].data_ptr() for i in range(3)]
        assert torch.equal(pool.pages.read(entries).keys[:, 0], keys)


@pytest.mark.parametrize("layout", [PageLayout(4, 5, 3, torch.float16), PageLayout(4, 5, 3, torch.float64)])
def test_an_anchor_of_another_dtype_is_refused(layout):
    with pytest.raises(ValueError, match=r"cannot count from an anchor of torch\.float32"):
        Pages(layout, "cpu", anchor=Pages(LAYOUT, "cpu").anchor)


def test_an_anchor_of_another_device_is_refused():
    with pytest.raises(ValueError, match="on 'meta'"):
        Pages(LAYOUT, "cpu", anchor=torch.zeros(16, device="meta"))


def test_copies_of_pools_with_one_anchor_have_one_again():
    first = PagePool(LAYOUT, "cpu")
    second = PagePool(PageLayout(4, 8, 8, torch.float32), "cpu", anchor=first.pages.anchor)
    first.allocate(2)
    second.allocate(3)
    copies = copy.deepcopy([first, second])
    assert copies[0].pages.anchor is copies[1].pages.anchor
    assert copies[0].pages.anchor is not first.pages.anchor
    assert copy.deepcopy(second).pages.anchor is not first.pages.anchor
