"""What a slot may read about one sequence in one layer: its stored tokens as units, their features and statistics.

Heads that hold the same positions (always the case before the first eviction) are computed together; ragged heads
one by one. Everything that slots see is [H, U] with U the longest head's units; `valid` marks real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from kvpress_kernels.dispatch import BackendName, op
from kvpress_kernels.reference.window_scores import attention_probs, unit_vectors


@dataclass(frozen=True)
class LayerSpec:
    """What evidence needs to know of an attention layer.

    index: place among all layers; group: query heads per KV head; sinks: [H, G] learned logits or None;
    output_weight: [H, G, Dv, hidden] slices of W_O, None when no slot reads it. backend: who computes statistics.
    """

    index: int
    group: int
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    output_weight: Tensor | None = None
    backend: BackendName = "torch"

    @cached_property
    def output_basis(self) -> Tensor:
        """[H, G, Dv, Dv] basis L with |v L| = |v W_O|: L L^T = W_O W_O^T, from its eigenvectors (it may be singular)."""
        assert self.output_weight is not None
        weight = _wide(self.output_weight)
        values, vectors = torch.linalg.eigh(weight @ weight.transpose(-1, -2))
        basis: Tensor = vectors * values.clamp(min=0).sqrt()[..., None, :]
        return basis


@dataclass(frozen=True)
class Queries:
    """Proxy queries of one sequence: vectors [H, G, Q, D], positions [Q] (from the first real token), weights [Q]."""

    vectors: Tensor
    positions: Tensor
    weights: Tensor

    def subset(self, chosen: Tensor) -> Queries:
        """The queries that the boolean mask [Q] chooses."""
        return Queries(self.vectors[:, :, chosen], self.positions[chosen], self.weights[chosen])


@dataclass(frozen=True)
class HeadGroup:
    """KV heads that store the same positions: keys [S, N, D], values [S, N, Dv], positions [N] ascending.

    bases: [S, D, r] of the keys and [S, Dv, r] of the values where both are stored in a reduced space. Queries and W_O are brought into
    it, so that everything is computed there: masses are those of the reduced attention, and norms of value differences are the same
    in both spaces because the columns are orthonormal.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    bases: tuple[Tensor, Tensor] | None = None

    def query(self, vectors: Tensor) -> Tensor:
        """Queries [S, ..., D] in the space of the keys."""
        if self.bases is None:
            return vectors
        basis = self.bases[0].reshape(self.bases[0].shape[0], *(1,) * (vectors.dim() - 3), *self.bases[0].shape[1:])
        return vectors.to(basis.dtype) @ basis

    def full_values(self, values: Tensor) -> Tensor:
        """Some of the values [S, n, r] in the full space, for norms that are not the same in both."""
        return values if self.bases is None else values @ self.bases[1].to(values.dtype).transpose(1, 2)

    def weight(self, matrix: Tensor) -> Tensor:
        """A matrix [S, G, Dv, m] that values are multiplied by, for values as they are stored."""
        if self.bases is None:
            return matrix
        basis = self.bases[1].to(matrix.dtype)
        return basis.transpose(1, 2)[:, None] @ matrix


@dataclass(frozen=True)
class _Table:
    """Units of a head group: first position [U], tokens [U], index of the tokens [U, P] (None: a token is a unit)."""

    starts: Tensor
    sizes: Tensor
    slots: Tensor | None


#: (features, queries) -> statistics [H, G, U] under at least the names that the caller asks for
SharedReader = Callable[["UnitFeatures", Queries], dict[str, Tensor]]


class UnitFeatures:
    """The stored tokens of one sequence in one layer, cut into units of `block_size` positions."""

    def __init__(
        self, spec: LayerSpec, groups: Sequence[HeadGroup], block_size: int, shared: SharedReader | None = None
    ) -> None:
        """shared: gives the statistics of queries where several caches ask for them over the same tokens."""
        self.spec, self.groups, self.block_size, self._shared = spec, groups, block_size, shared
        self.layer = spec.index
        self._tables = [_cut(group.positions, block_size) for group in groups]
        self.n_units = max(table.starts.numel() for table in self._tables)
        self.starts = self._stack([t.starts.expand(g.keys.shape[0], -1) for g, t in self._pairs()])  # [H, U]
        self.sizes = self._stack([t.sizes.expand(g.keys.shape[0], -1) for g, t in self._pairs()])
        self.valid = self.sizes > 0

    @property
    def n_heads(self) -> int:
        return self.starts.shape[0]

    def head(self, index: int) -> tuple[HeadGroup, _Table, int]:
        """The group that holds KV head `index`, its units, and the head's place in the group."""
        for group, table in self._pairs():
            if index < group.keys.shape[0]:
                return group, table, index
            index -= group.keys.shape[0]
        raise IndexError(index)

    def token_mask(self, head: int, units: Tensor) -> Tensor:
        """Tokens [N] of a head that belong to the chosen units [U] (bool)."""
        _, table, _ = self.head(head)
        chosen = units[: table.starts.numel()]
        return chosen if table.slots is None else torch.repeat_interleave(chosen, table.sizes)

    def units_with(self, test: Callable[[Tensor], Tensor]) -> Tensor:
        """[H, U] bool: units with a stored token whose position passes `test` ([N] positions -> [N] bool)."""
        return self._stack(
            [self._unit_mean(test(g.positions).float(), t).expand(g.keys.shape[0], -1) for g, t in self._pairs()]
        ).bool()

    def statistics(
        self, queries: Queries, names: Collection[str], reducer: str, in_output_space: bool = False
    ) -> dict[str, Tensor]:
        """Statistics [H, G, U] of `window_scores`, zero where no unit is; the caller may change them."""
        if self._shared is not None:
            found = self._shared(self, queries)
            return {name: found[name].clone() for name in names}
        return self.read_statistics(queries, names, reducer, in_output_space)

    def read_statistics(
        self, queries: Queries, names: Collection[str], reducer: str, in_output_space: bool
    ) -> dict[str, Tensor]:
        """`statistics` by a pass over the keys, whoever else may ask for them."""
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        first = 0
        for group, table in self._pairs():
            heads = slice(first, first + group.keys.shape[0])
            found = op("window_scores", self.spec.backend)(
                group.query(queries.vectors[heads]), group.keys, group.values, queries.positions, group.positions, queries.weights,
                scale=self.spec.scale, statistics=names, unit_slots=table.slots, reducer=reducer,
                softcap=self.spec.softcap, sinks=None if self.spec.sinks is None else self.spec.sinks[heads],
                value_basis=group.weight(self.spec.output_basis[heads]) if in_output_space else None,
            )  # fmt: skip
            for name, value in found.items():
                parts[name].append(value)
            first = heads.stop
        return {name: self._stack(values) for name, values in parts.items()}

    def vectors(self, head: int, queries: Queries) -> tuple[Tensor, Tensor]:
        """Mass [G*Q, U] and displacement g [G*Q, U, Dv] of a head's units, float32 or wider, zero where no unit is."""
        probs, values = self._attention(head, queries)
        mass, shift = unit_vectors(probs[None], values[None], self.head(head)[1].slots)
        absent = self.n_units - mass.shape[-1]
        return F.pad(mass.flatten(0, 2), (0, absent)), F.pad(shift.flatten(0, 2), (0, 0, 0, absent))

    def loss(self, head: int, query: Queries, kept: Tensor) -> tuple[Tensor, Tensor]:
        """What one query [H, G, 1, D] loses in a KV head when only the tokens `kept` (indices) stay; both [G].

        The share of its attention over the stored tokens that is gone, and |o without them - o| / |o|. With m the
        kept mass, learned sinks included, o without them is sum_kept a_i v_i / m: exact for the set, not a sum over it.
        """
        probs, values = self._attention(head, query)  # [G, 1, N], [N, Dv]
        stays = torch.zeros_like(probs[0]).index_fill_(-1, kept, 1.0)
        inside, total = (probs * stays).sum(-1), probs.sum(-1)  # [G, 1]
        tiny = torch.finfo(probs.dtype).tiny
        sink = (1 - total).clamp(min=0) if self.spec.sinks is not None else torch.zeros_like(total)
        output, rest = probs @ values, (probs * stays) @ values / (inside + sink).clamp(min=tiny)[..., None]
        change = (rest - output).norm(dim=-1) / output.norm(dim=-1).clamp(min=tiny)
        return (1 - inside / total.clamp(min=tiny))[:, 0], change[:, 0]

    def _attention(self, head: int, queries: Queries) -> tuple[Tensor, Tensor]:
        """Attention [G, Q, N] of the queries over a head's tokens, and its values [N, Dv], float32 or wider."""
        group, _, place = self.head(head)
        dtype = torch.float64 if group.keys.dtype == torch.float64 else torch.float32
        at = slice(place, place + 1)
        sinks = None if self.spec.sinks is None else self.spec.sinks[head : head + 1].to(dtype)
        probs = attention_probs(
            self._query(group, at, queries.vectors[head : head + 1]).to(dtype), group.keys[at].to(dtype), queries.positions, group.positions,
            self.spec.scale, self.spec.softcap, sinks,
        )  # fmt: skip
        return probs[0], group.values[place].to(dtype)

    @staticmethod
    def _query(group: HeadGroup, at: slice, vectors: Tensor) -> Tensor:
        """Queries [1, G, Q, D] of one head of a group in the space of its keys."""
        bases = None if group.bases is None else (group.bases[0][at], group.bases[1][at])
        return replace(group, bases=bases).query(vectors)

    def key_norm(self) -> Tensor:
        """[H, U] L2 norm of the keys, mean over the unit's tokens."""
        return self._stack([self._unit_mean(_wide(g.keys).norm(dim=-1), t) for g, t in self._pairs()])

    def value_norm(self, order: int) -> Tensor:
        """[H, U] L1 or L2 norm of the values, mean over the unit's tokens; of a reduced space those of what is brought back."""
        norms = [
            torch.cat([g.full_values(part).norm(order, dim=-1) for part in _wide(g.values).split(4096, 1)], 1)
            for g in self.groups
        ]
        return self._stack([self._unit_mean(norm, table) for norm, table in zip(norms, self._tables, strict=True)])

    def output_norm(self, order: int) -> Tensor:
        """[H, G, U] L1 or L2 norm of v W_O, mean over the unit's tokens, one query head at a time."""
        weight = self.spec.output_weight
        assert weight is not None
        parts, first = [], 0
        for group, table in self._pairs():
            n = group.keys.shape[0]
            values, seen = group.values.to(weight.dtype), group.weight(weight[first : first + n])
            norms = [
                torch.stack([
                    torch.cat([_wide(part @ seen[s, g]).norm(order, dim=-1) for part in values[s].split(4096)])
                    for g in range(self.spec.group)
                ])
                for s in range(n)
            ]  # fmt: skip
            parts.append(self._unit_mean(torch.stack(norms), table))
            first += n
        return self._stack(parts)

    def distance_to_mean(self, share: Tensor) -> Tensor:
        """[H, U] |o - v_c|_2 with v_c the unit's mean value and o = sum_c share_c v_c; share: [H, U] summing to 1."""
        parts, first = [], 0
        for group, table in self._pairs():
            n = group.keys.shape[0]
            values = self._unit_mean(group.values.to(share.dtype).transpose(1, 2), table).transpose(1, 2)  # [S, U, Dv]
            weights = share[first : first + n, : values.shape[1]]
            parts.append((torch.einsum("su,sud->sd", weights, values)[:, None] - values).norm(dim=-1))
            first += n
        return self._stack(parts)

    def _pairs(self) -> list[tuple[HeadGroup, _Table]]:
        return list(zip(self.groups, self._tables, strict=True))

    def _stack(self, parts: list[Tensor]) -> Tensor:
        """Heads of all groups in one tensor, units padded with zeros to the longest."""
        return torch.cat([F.pad(part, (0, self.n_units - part.shape[-1])) for part in parts])

    @staticmethod
    def _unit_mean(per_token: Tensor, table: _Table) -> Tensor:
        """[..., N] -> [..., U]."""
        if table.slots is None:
            return per_token
        gathered = per_token[..., table.slots.clamp(min=0)] * (table.slots >= 0)
        return gathered.sum(-1) / table.sizes


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _cut(positions: Tensor, block_size: int) -> _Table:
    """Units of ascending positions: runs that share position // block_size."""
    if block_size == 1:
        return _Table(positions, torch.ones_like(positions), None)
    blocks, sizes = torch.unique_consecutive(positions // block_size, return_counts=True)
    ends = sizes.cumsum(0)
    slots = (ends - sizes)[:, None] + torch.arange(block_size, device=positions.device)
    return _Table(blocks * block_size, sizes, torch.where(slots < ends[:, None], slots, -1))
