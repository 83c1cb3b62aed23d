"""One attention layer's cache: dense while the prompt is read, packed and ragged afterwards.

The life of a layer. `update` (called by the model) stashes new keys and values and hands them on with a reference to
this layer; the attention function (kvpress/attention.py) then calls `attend`. While the prompt is read the user's own
attention runs over plain dense tensors. As soon as this layer has seen the whole prompt it evicts and packs, and from
then on attention runs over the packed store.

Two lengths are kept apart: `seen`, the logical length from which the model derives positions, and what is stored.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvpress.cache.evidence_buffer import EvidenceBuffer
from kvpress.cache.packed import PackedStore
from kvpress.cache.plan import Plan
from kvpress.errors import KvpressError
from kvpress.evidence import HeadGroup, LayerSpec, UnitFeatures
from kvpress.selection import Problem
from kvpress_kernels.reference.ragged_attention import ragged_attention
from kvpress_kernels.reference.ragged_decode import ragged_decode

if TYPE_CHECKING:
    from kvpress.cache.cache import CompressedCache

#: (query [B, Hq, q, D], keys [B, H, n, D], values, mask) -> [B, q, Hq, Dv]: the model's own attention
UserAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

#: name of the attribute by which a key tensor carries its layer to the attention function
HANDLE = "_kvpress_layer"


class CompressedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Cache of one full-attention layer. `index`: among all layers; `place`: among the compressed ones."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, plan: Plan, cache: CompressedCache, index: int, place: int) -> None:
        super().__init__()
        self.plan, self.index, self.place = plan, index, place
        self._cache = weakref.ref(cache)
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.keys = self.values = None  # nothing outside may touch the storage by these names
        self.seen = 0
        self.spec: LayerSpec | None = None
        self.dense: tuple[Tensor, Tensor] | None = None  # [B, H, n, D], [B, H, n, Dv] while the prompt is read
        self.valid: Tensor | None = None  # [B, n] bool on the host; None: no padding
        self.store: PackedStore | None = None
        self.offsets: list[int] = []  # column of each row's first real token
        self.evidence = EvidenceBuffer(self.plan)
        self.steps_at_eviction: int | None = None
        self._pending: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.n_rows, self.n_heads = key_states.shape[:2]
        self.offsets = [0] * self.n_rows
        self.is_initialized = True

    # --- what the model calls -------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stash new keys [B, H, q, D] and values and hand on what the attention function needs."""
        if self._pending is not None:
            raise KvpressError(
                "this cache belongs to a model that is not attached: keep the `kvpress.compress` context (or the "
                "CompressedCache it was made with) open while the model runs"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n_new = key_states.shape[2]
        if self.plan.probing:
            assert self.dense is not None
            keys = torch.cat([self.dense[0], key_states], 2)
            values = torch.cat([self.dense[1], value_states], 2)
            self._pending = (keys, values)
            return self._with_handle(keys), values
        cache = self._cache()
        assert cache is not None
        cache.before_update(self, n_new)
        self.seen += n_new
        self._pending = (key_states, value_states)
        if self.store is not None:
            return self._with_handle(key_states), value_states
        n_prompt = self._prompt_part(n_new)
        keys, values = key_states[:, :, :n_prompt], value_states[:, :, :n_prompt]
        if self.dense is not None:
            keys, values = torch.cat([self.dense[0], keys], 2), torch.cat([self.dense[1], values], 2)
        self.dense = (keys, values)
        return self._with_handle(keys), values

    def _with_handle(self, keys: Tensor) -> Tensor:
        alias = keys.view(keys.shape)  # an own object: the stored tensor must not refer back to this layer
        setattr(alias, HANDLE, self)
        return alias

    def _prompt_part(self, n_new: int) -> int:
        """How many of the new tokens go to the dense prompt: a draft behind it (assisted decoding) goes to the store."""
        end = self.plan.prompt_length
        if end is None or self.plan.needs_all_layers or self.plan.needs_probe:
            return n_new
        return min(n_new, max(end - (self.seen - n_new), 0))

    def attend(
        self, query: Tensor, mask: Tensor | None, user_attention: UserAttention, spec: LayerSpec
    ) -> Tensor:
        """Attention of new queries over this cache, and eviction where the contract asks for it.

        Args:
            query: [B, Hq, q, D] after RoPE; mask: as the user's attention gets it.
            user_attention: (query, keys, values, mask) -> [B, q, Hq, Dv], the model's own implementation.
            spec: scale and the like.

        Returns:
            [B, q, Hq, Dv].
        """
        assert self._pending is not None
        keys, values = self._pending
        self._pending, self.spec = None, spec
        if self.plan.probing:
            self.evidence.absorb_probe(self, query, keys, values)
            return user_attention(query, keys, values, mask)
        n_new = query.shape[2]
        if mask is not None and (n_new > 1 or self.store is None):
            self._note_padding(valid_columns(mask, self.n_rows))
        split = self._prompt_part(n_new)
        outputs = []
        for part, in_prompt in ((slice(0, split), True), (slice(split, n_new), False)):
            if part.start < part.stop:
                new = (query[:, :, part], keys[:, :, part], values[:, :, part])
                outputs.append(self._attend_part(*new, self.seen - n_new + part.start, mask, user_attention))
                self._after_part(query[:, :, part], self.seen - n_new + part.start, in_prompt)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _attend_part(
        self, query: Tensor, keys: Tensor, values: Tensor, first: int, mask: Tensor | None, user_attention: UserAttention
    ) -> Tensor:
        """Attention of queries at columns first, first + 1, ..., all of the prompt or all behind it."""
        n_new = query.shape[2]
        if self.store is None:
            assert self.dense is not None
            n_keys = self.dense[0].shape[2]
            if mask is not None:  # cut off a draft that is not part of the prompt
                mask = mask[..., :n_keys] if mask.dim() == 2 else mask[:, :, :n_new, :n_keys]
            return user_attention(query, *self.dense, mask)
        assert self.spec is not None
        columns = torch.arange(first, first + n_new, device=query.device)
        valid = None if self.valid is None or n_new == 1 else self.valid[:, first : first + n_new]
        self.store.append(keys, values, columns, None if valid is None or bool(valid.all()) else valid)
        sinks = None if self.spec.sinks is None else self.spec.sinks.flatten()
        storage = (self.store.keys, self.store.values)
        grouped = query.unflatten(1, (self.n_heads, self.spec.group))  # [B, H, G, q, D]
        options: dict[str, Any] = {"scale": self.spec.scale, "softcap": self.spec.softcap, "sinks": sinks}
        if n_new == 1:
            out = ragged_decode(grouped[..., 0, :], *storage, self.store.starts, self.store.lengths, **options)
            return out.flatten(1, 2)[:, None]
        out = ragged_attention(
            grouped, *storage, self.store.positions, self.store.starts, self.store.lengths, columns, **options
        )
        return out.flatten(1, 2).transpose(1, 2).contiguous()

    # --- eviction -------------------------------------------------------------------------------------------------

    def _after_part(self, query: Tensor, first: int, in_prompt: bool) -> None:
        end, prompt = first + query.shape[2], self.plan.prompt_length
        assert prompt is not None
        cache = self._cache()
        assert cache is not None
        self.evidence.collect(self, query, first, in_prompt)
        if not in_prompt:
            return
        if end < prompt:
            if self.plan.evicts and self.plan.contract.schedule.evicts_between_chunks:
                cache.cut([self], end)
            else:
                with self.plan.clock.measure("evidence", self.device):
                    self.evidence.fold(self, end)
        else:
            cache.prompt_read(self)

    def problems(self, limit: int) -> list[Problem]:
        """One decision problem per row over the tokens in columns before `limit`."""
        found = []
        for row in range(self.n_rows):
            n_prompt = self._real_tokens(row, self.plan.prompt_length or limit)
            budget = self.plan.contract.budget.tokens_per_head(n_prompt, self.plan.n_heads_total, self.token_bytes)
            queries, carried, last = self.evidence.of_row(self, row, limit)
            found.append(
                Problem(
                    self.features(row, limit), queries, carried, last, limit - self.offsets[row], budget,
                    self.place, self.plan.n_layers,
                )
            )  # fmt: skip
        return found

    def features(self, row: int, limit: int) -> UnitFeatures:
        """The stored tokens of one row in columns before `limit`, as units."""
        assert self.spec is not None
        block = self.plan.contract.granularity.block_size
        offset = self.offsets[row]
        if self.store is None:
            assert self.dense is not None
            columns = self._columns(row, limit)
            contiguous = int(columns[-1]) - int(columns[0]) + 1 == columns.numel()
            at = slice(int(columns[0]), int(columns[-1]) + 1) if contiguous else columns.to(self.device)
            keys, values = self.dense[0][row][:, at], self.dense[1][row][:, at]
            return UnitFeatures(self.spec, [HeadGroup(keys, values, columns.to(self.device) - offset)], block)
        groups = []
        for head in range(self.n_heads):
            keys, values, positions = self.store.segment(row * self.n_heads + head)
            n = int((positions < limit).sum())
            groups.append(HeadGroup(keys[None, :n], values[None, :n], positions[:n].long() - offset))
        return UnitFeatures(self.spec, groups, block)

    def apply(self, kept: Sequence[Sequence[Tensor]] | None, limit: int) -> None:
        """Store only the kept tokens (indices among those before `limit`, per row and head) and all behind `limit`.

        None keeps everything; the prompt's dense tensors are freed in either case.
        """
        if self.store is not None:
            if kept is not None:
                indices = []
                for index in range(len(self.store.lengths)):
                    row, head = divmod(index, self.n_heads)
                    positions = self.store.segment(index)[2]
                    newer = torch.arange(int((positions < limit).sum()), positions.numel(), device=positions.device)
                    indices.append(torch.cat([kept[row][head], newer]))
                self.store.keep(indices)
            return
        assert self.dense is not None
        n_columns = self.dense[0].shape[2]
        columns = []
        for row in range(self.n_rows):
            stored = self._columns(row, n_columns).to(self.device)
            older, newer = stored[stored < limit], stored[stored >= limit]
            for head in range(self.n_heads):
                columns.append(stored if kept is None else torch.cat([older[kept[row][head]], newer]))
        self.store = PackedStore(*self.dense, columns)
        self.dense = None

    @property
    def token_bytes(self) -> int:
        """Bytes of one stored token in one KV head, its position included."""
        if self.store is not None:
            return self.store.token_bytes
        assert self.dense is not None
        return sum(t.shape[-1] * t.element_size() for t in self.dense) + 4

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that this layer owns."""
        stored = self.store.nbytes if self.store is not None else 0
        dense = sum(t.numel() * t.element_size() for t in self.dense) if self.dense is not None else 0
        return stored + dense + self.evidence.nbytes

    def _columns(self, row: int, limit: int) -> Tensor:
        """Columns of the row's real tokens before `limit` (host)."""
        return torch.arange(limit) if self.valid is None else self.valid[row, :limit].nonzero().flatten()

    def _real_tokens(self, row: int, limit: int) -> int:
        return limit if self.valid is None else int(self.valid[row, :limit].sum()) + max(limit - self.valid.shape[1], 0)

    def _note_padding(self, valid: Tensor) -> None:
        if bool(valid.all()) and self.valid is None:
            return
        self.valid = valid
        self.offsets = [int(row.int().argmax()) for row in valid]

    # --- what transformers' cache interface asks for --------------------------------------------------------------

    def get_seq_length(self) -> int:
        """The logical length: tokens seen, evicted ones and padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (a rejected draft); as in transformers the count is given as a negative number."""
        n = abs(tokens_to_remove)
        if n == 0 or not self.is_initialized:
            return
        self.seen -= n
        self.evidence.truncate(self.seen)
        if self.valid is not None:
            self.valid = self.valid[:, : self.seen]
        if self.store is not None:
            self.store.truncate(self.seen)
        elif self.dense is not None:
            self.dense = (self.dense[0][:, :, : self.seen], self.dense[1][:, :, : self.seen])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([row for row in range(getattr(self, "n_rows", 0)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._select(rows.tolist())

    def _select(self, rows: list[int]) -> None:
        if not self.is_initialized:
            return
        if self.store is not None:
            self.store.select_rows(rows)
        if self.dense is not None:
            self.dense = (self.dense[0][rows], self.dense[1][rows])
        if self.valid is not None:
            self.valid = self.valid[rows]
        self.offsets = [self.offsets[row] for row in rows]
        self.evidence.select_rows(rows)
        self.n_rows = len(rows)

    def reset(self) -> None:
        self._clear()

    def offload(self) -> None:
        raise KvpressError("an offloaded cache keeps K and V on the CPU, which a compressed cache does not support")

    prefetch = offload


def valid_columns(mask: Tensor, n_rows: int) -> Tensor:
    """[B, n] bool on the host: columns that the last query may see, that is, real tokens.

    mask: [B, n] of 0 and 1 (flash), or [B or 1, 1, q, n] as bool or as an additive float mask.
    """
    last = mask if mask.dim() == 2 else mask[:, 0, -1]
    if last.dtype.is_floating_point:
        last = last > torch.finfo(last.dtype).min / 2
    return last.bool().cpu().expand(n_rows, -1)
