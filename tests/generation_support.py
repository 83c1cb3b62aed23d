"""Contracts and readings that several tests of generation share."""

import pytest

import kvpress
from kvpress.cache.paged import PagedStore


def small(name, **slots):
    """A preset at 40 % with protections that fit a short prompt."""
    contract = kvpress.Contract.load(name, 0.4)
    if contract.protection.kind == "standard" and contract.protection.recent > 8:
        contract = contract.swap(protection={**contract.protection.model_dump(), "recent": 8})
    if name == "kvzip":
        slots["query_law"] = {"kind": "reconstruction", "chunk": 32, "instruction": "", "continuation": ""}
    return contract.swap(**slots)


def kept(session):
    return [[p.tolist() for _, _, p in layer.storage.store.segments()] for layer in session.cache.compressed_layers]


def blind_replay(step):
    """Repeat a step without host lengths: whatever reads them fails."""

    def replay():
        hidden = property(lambda self: pytest.fail("a captured step read the host's lengths"))
        seen = PagedStore.__dict__.get("lengths")
        PagedStore.lengths = hidden
        try:
            step()
        finally:
            if seen is None:
                del PagedStore.lengths

    return replay
