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


class BlindCapture:
    """Stands in for the capture: keeps the step and runs it again without host lengths, so that reading them fails."""

    def obstacle(self, device):
        return None

    def warm_up(self, step, device):
        step()

    def capture(self, step, device):
        def replay():
            PagedStore.lengths = property(lambda self: pytest.fail("a captured step read the host's lengths"))
            try:
                step()
            finally:
                del PagedStore.lengths

        return replay
