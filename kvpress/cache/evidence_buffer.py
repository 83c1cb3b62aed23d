"""The queries that one layer keeps until its next eviction, and the statistics of queries that are gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpress.cache.plan import Plan
from kvpress.cache.problems import features
from kvpress.carried import CarriedStatistics
from kvpress.evidence import HeadGroup, Queries, UnitFeatures
from kvpress.selection import Problem, evidence_statistics, total_weight

if TYPE_CHECKING:
    from kvpress.cache.layer import CompressedLayer

#: drafted tokens that may be rejected after their queries were kept (assisted decoding)
DRAFT_SLACK = 64


class EvidenceBuffer:
    """Proxy queries of one layer.

    A law with few queries (tail) keeps the queries themselves: which of them count is known only at the end. A
    cumulative law adds their statistics up, chunk by chunk, so that no more than one chunk of queries is ever held.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.queries: list[tuple[Tensor, Tensor]] = []  # [B, Hq, q, D] and their columns [q]
        self.last: tuple[Tensor, Tensor] | None = None  # the newest queries [B, Hq, m, D] and their columns [m]
        self.carried: list[CarriedStatistics] = []  # per row

    @property
    def nbytes(self) -> int:
        tensors = [t for pair in [*self.queries, *([self.last] if self.last else [])] for t in pair]
        return sum(t.numel() * t.element_size() for t in tensors) + sum(c.nbytes for c in self.carried)

    def collect(self, layer: CompressedLayer, query: Tensor, first: int, in_prompt: bool) -> None:
        """Keep what the query law may need of the queries [B, Hq, q, D] at columns first, first + 1, ..."""
        plan, law = self.plan, self.plan.contract.query_law
        expected = in_prompt or plan.contract.schedule.expects_eviction(layer.steps_at_eviction)
        if not plan.evicts or not expected:
            return
        assert plan.prompt_length is not None
        if in_prompt:  # a deferred decision reads a draft along with the prompt: its queries are no evidence
            query = query[:, :, : max(plan.prompt_length - first, 0)]
        columns = torch.arange(first, first + query.shape[2])
        if query.shape[2] == 0:
            return
        # of a draft any token may turn out to be the newest one
        newest = 1 if in_prompt else DRAFT_SLACK
        self.last = (query[:, :, -newest:].clone(), columns[-newest:])
        wanted_here = law.origin == "stream" if in_prompt else law.origin in ("stream", "first_decode_steps")
        if not plan.contract.ranking.statistics or not wanted_here:
            return
        if in_prompt:
            per_chunk = plan.contract.schedule.evicts_between_chunks
            ends = [int(columns[-1]) + 1 if per_chunk else plan.prompt_length]
        else:
            ends = [layer.seen, max(layer.seen - DRAFT_SLACK, 1)]
        self.queries.append((query, columns))
        # a cumulative law drops nothing; while decoding a look at every buffered query at every step would cost more
        # than the few queries that stay a little longer
        if in_prompt or (not law.cumulative and len(self.queries) % 16 == 0):
            self.queries = [self._trim(layer, *pair, ends) for pair in self.queries]
            self.queries = [pair for pair in self.queries if pair[1].numel()]

    def _trim(self, layer: CompressedLayer, query: Tensor, columns: Tensor, ends: list[int]) -> tuple[Tensor, Tensor]:
        """Drop queries that have no weight in any row at any of the possible ends."""
        law = self.plan.contract.query_law
        used = torch.zeros(columns.numel(), dtype=torch.bool)
        storage = layer.storage
        for row in range(1 if storage.valid is None else storage.n_rows):
            positions = storage.positions(row, columns)
            for end in ends:
                used |= law.weights(positions, storage.real_tokens(row, end)) > 0
        if bool(used.all()):
            return query, columns
        return query[:, :, used.to(query.device)], columns[used]

    def of_row(
        self, layer: CompressedLayer, row: int, limit: int
    ) -> tuple[Queries | None, CarriedStatistics | None, Queries | None]:
        """Queries at hand, carried statistics, and the newest query of one row, for a decision at column `limit`."""
        carried = self.carried[row] if self.carried else None
        storage, law = layer.storage, self.plan.contract.query_law
        queries = None
        if self.queries:
            vectors = torch.cat([query[row] for query, _ in self.queries], 1)
            positions = storage.positions(row, torch.cat([columns for _, columns in self.queries]))
            weights = law.weights(positions, storage.real_tokens(row, limit))
            queries = self._queries(layer, vectors, positions, weights)
        last = None
        if self.last is not None:
            vectors, columns = self.last[0][row, :, -1:], self.last[1][-1:]
            last = self._queries(layer, vectors, storage.positions(row, columns), torch.ones(1))
        return queries, carried, last

    @staticmethod
    def _queries(layer: CompressedLayer, vectors: Tensor, positions: Tensor, weights: Tensor) -> Queries:
        assert layer.spec is not None
        grouped = vectors.unflatten(0, (layer.storage.n_heads, layer.spec.group))
        return Queries(grouped, positions.to(vectors.device), weights.to(vectors.device))

    def fold(self, layer: CompressedLayer, limit: int) -> None:
        """Turn the queries of a cumulative law into statistics and let them go."""
        if not self.plan.contract.query_law.cumulative or not self.queries:
            return
        self.carried = [self._folded(layer, row, limit) for row in range(layer.storage.n_rows)]
        self.queries = []

    def _folded(self, layer: CompressedLayer, row: int, limit: int) -> CarriedStatistics:
        queries, carried, _ = self.of_row(layer, row, limit)
        if layer.storage.real_tokens(row, limit) == 0:  # still all padding
            return CarriedStatistics.empty(layer.storage.n_heads, layer.device)
        problem = Problem(features(layer, row, limit), queries, carried, None, limit, 0, layer.place, 1)
        statistics = evidence_statistics(self.plan.contract, problem)
        return CarriedStatistics.of(statistics, problem.features, total_weight(problem))

    def absorb_probe(self, layer: CompressedLayer, query: Tensor, keys: Tensor, values: Tensor) -> None:
        """Add the statistics of an extra pass: queries [B, Hq, q, D] behind a context of which keys [B, H, n, D] are all.

        The probe's own tokens take part in the attention, but their units vanish when the pass is over.
        """
        assert layer.spec is not None
        n_probe, n_all = query.shape[2], keys.shape[2]
        columns = torch.arange(n_all)
        probe_valid = self.plan.probe_valid
        carried = []
        for row in range(layer.storage.n_rows):
            valid = torch.ones(n_all, dtype=torch.bool) if layer.storage.valid is None else torch.cat(
                [layer.storage.valid[row, : n_all - n_probe], torch.ones(n_probe, dtype=torch.bool)]
            )  # fmt: skip
            valid[self.plan.prompt_length : n_all - n_probe] = False  # a draft behind the prompt
            asked = torch.ones(n_probe, dtype=torch.bool)
            if probe_valid is not None:
                asked = probe_valid[row]
                valid[n_all - n_probe :] = asked
            stored = columns[valid]
            block = self.plan.contract.granularity.block_size
            # the probe starts a block of its own, so that no block mixes prompt and probe
            n_prompt = int(valid[: n_all - n_probe].sum())
            shift = -n_prompt % block
            positions = torch.arange(stored.numel()) + shift * (stored >= n_all - n_probe)
            group = HeadGroup(
                keys[row][:, stored.to(keys.device)], values[row][:, stored.to(keys.device)], positions.to(keys.device)
            )
            features = UnitFeatures(layer.spec, [group], block)
            at = n_prompt + asked.long().cumsum(0) - 1 + shift
            queries = self._queries(layer, query[row], at, asked.double())
            before = self.carried[row] if self.carried else None
            problem = Problem(features, queries, before, None, n_all, 0, layer.place, 1)
            statistics = evidence_statistics(self.plan.contract, problem)
            carried.append(CarriedStatistics.of(statistics, features, total_weight(problem)))
        self.carried = carried

    def clear_after_cut(self, layer: CompressedLayer) -> None:
        """Forget everything unless another eviction of this turn will read it again."""
        assert self.plan.prompt_length is not None
        in_prompt = layer.seen < self.plan.prompt_length
        if not in_prompt and not self.plan.contract.schedule.expects_eviction(layer.steps_at_eviction):
            self.clear()
        for row, carried in enumerate(self.carried):  # what was evicted must not come back with a block that grows
            groups = layer.storage.groups(row, layer.seen)
            carried.keep(
                [g.positions for g in groups for _ in range(g.keys.shape[0])], self.plan.contract.granularity.block_size
            )

    def clear(self) -> None:
        """Forget everything."""
        self.queries, self.carried, self.last = [], [], None

    def truncate(self, column: int) -> None:
        """Forget queries at or behind a column."""
        pairs = [*self.queries, *([self.last] if self.last else [])]
        kept = [(query[:, :, (at < column).to(query.device)], at[at < column]) for query, at in pairs]
        if self.last is not None:
            newest = kept.pop()
            self.last = newest if newest[1].numel() else None
        self.queries = [pair for pair in kept if pair[1].numel()]

    def select_rows(self, rows: list[int]) -> None:
        """Keep, reorder or repeat rows."""
        self.queries = [(query[rows], columns) for query, columns in self.queries]
        if self.last is not None:
            self.last = (self.last[0][rows], self.last[1])
        if self.carried:
            self.carried = [self.carried[row] for row in rows]
