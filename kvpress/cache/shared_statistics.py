"""Statistics of proxy queries that several arms of a fan-out ask for over the same keys: computed once, under the names that any of them needs.

Arms share where the same queries look at the same units in the same way; what they make of it (ranking, access, budget, retention) is
their own. Sharing ends with the prompt: after it every arm stores tokens of its own.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from kvpress.contract import Contract
from kvpress.evidence import Queries, SharedReader, UnitFeatures
from kvpress.slots.access import Aggregate

if TYPE_CHECKING:
    from kvpress.cache.cache import CompressedCache
    from kvpress.cache.plan import Clock


class SharedStatistics:
    """The statistics of one group of arms. `repeated`: seconds that were booked to an arm although another one had spent them."""

    def __init__(self, names: frozenset[str], reducer: str, in_output_space: bool) -> None:
        self.names, self.reducer, self.in_output_space = names, reducer, in_output_space
        self.repeated = 0.0
        self._known: dict[Hashable, tuple[dict[str, Tensor], float]] = {}

    def reader(self, row: int, limit: int, clock: Clock) -> SharedReader:
        """What an arm's `UnitFeatures` of one row, in columns before `limit`, asks in place of the keys. clock: of the arm, which is booked
        what the statistics took even if another arm has paid, so that its costs are those that it has alone."""

        def read(features: UnitFeatures, queries: Queries) -> dict[str, Tensor]:
            # with layer and row, positions say which queries these are
            which = queries.positions.cpu().numpy().tobytes(), queries.weights.cpu().numpy().tobytes()
            key = (features.layer, row, limit, *which)
            if key in self._known:
                found, seconds = self._known[key]
                clock.evidence += seconds
                self.repeated += seconds
            else:
                start = time.perf_counter()
                found = features.read_statistics(queries, self.names, self.reducer, self.in_output_space)
                self._known[key] = found, time.perf_counter() - start
            return found

        return read

    def forget(self) -> None:
        """Let the statistics go: all arms have asked for them. Arms that decide at the last layer all ask there."""
        self._known.clear()


def share_statistics(arms: Sequence[CompressedCache]) -> list[SharedStatistics]:
    """Let arms with the same evidence share it, until `stop_sharing`."""
    groups: dict[Hashable, list[CompressedCache]] = {}
    for arm in arms:
        if arm.plan.evicts and arm.contract.ranking.statistics:
            groups.setdefault(_evidence(arm.contract), []).append(arm)
    made = []
    for some in groups.values():
        if len(some) > 1:
            first = some[0].contract
            names = frozenset(name for arm in some for name in arm.contract.ranking.statistics)
            made.append(SharedStatistics(names, _access(first).fresh_reducer, first.ranking.space == "output"))
            for arm in some:
                arm.plan.shared = made[-1]
    return made


def stop_sharing(arms: Sequence[CompressedCache]) -> None:
    """What arms read from now on is their own."""
    for arm in arms:
        arm.plan.shared = None


def _evidence(contract: Contract) -> Hashable:
    """What decides the statistics of the queries at hand: whose they are, over which units, how they are reduced, in which space."""
    law, granularity = contract.query_law.model_dump_json(), contract.granularity.model_dump_json()
    return law, granularity, _access(contract).fresh_reducer, contract.ranking.space


def _access(contract: Contract) -> Aggregate:
    assert isinstance(contract.access, Aggregate)
    return contract.access
