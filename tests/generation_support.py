"""Contracts and readings that several tests of generation share."""

import kvpress


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
