"""One attention layer's cache, as transformers sees it.

`update` (called by the model) stashes new keys and values and hands them on with a reference to this layer; the
attention function (kvpress/attention.py) then calls `attend`. While the prompt is read the user's own attention runs
over plain dense tensors. As soon as this layer has seen the whole prompt it is cut and packed, and from then on
attention runs over the packed store.

Two lengths are kept apart: `seen`, the logical length from which the model derives positions, and what is stored.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvpress.attach import HANDLE, UserAttention
from kvpress.backend import Backend
from kvpress.cache.evidence_buffer import EvidenceBuffer
from kvpress.cache.paged import PagedStore
from kvpress.cache.plan import Plan
from kvpress.cache.storage import LayerStorage, Store, empty_storage, own_storage, valid_columns
from kvpress.errors import KvpressError, UnsupportedModelError
from kvpress.evidence import LayerSpec
from kvpress_kernels.dispatch import BackendName

if TYPE_CHECKING:
    from kvpress.cache.cache import CompressedCache

HANDLE_LOST = (
    "this model's attention does not hand the cached keys to transformers' attention interface once per layer, as they "
    "come from the cache; models with ordinary attention do"
)


class CompressedLayer(CacheLayerMixin):
    """Cache of one full-attention layer. `index`: among all layers; `place`: among the compressed ones."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, plan: Plan, cache: CompressedCache, index: int, place: int) -> None:
        super().__init__()
        self.plan, self.index, self.place = plan, index, place
        self._cache = weakref.ref(cache)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self.keys = self.values = None  # nothing outside may touch the storage by these names
        self.seen = 0
        self.steps_at_eviction: int | None = None
        self.backend: Backend | None = None
        self.spec: LayerSpec | None = None
        self.storage = LayerStorage(0, 0)
        self.evidence = EvidenceBuffer(self.plan)
        self._pending: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.backend = self.plan.backend_for(key_states, value_states)
        self.storage = empty_storage(
            key_states, value_states, self.backend, self.plan.pool, self.plan.formats, self.place
        )
        self.is_initialized = True

    @property
    def cache(self) -> CompressedCache:
        cache = self._cache()
        assert cache is not None, "a layer does not outlive its cache"
        return cache

    @property
    def served_by(self) -> BackendName:
        """Whose ops this layer runs."""
        assert self.backend is not None
        return self.backend.name

    @property
    def n_heads(self) -> int:
        """KV heads."""
        return self.storage.n_heads

    @property
    def reads_output_weight(self) -> bool:
        """Whether the contract's ranking reads W_O."""
        ranking = self.plan.contract.ranking
        return ranking.needs_output_weight or ranking.space == "output"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that this layer owns."""
        return self.storage.nbytes + self.evidence.nbytes

    # --- what the model and the attention function call

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        grown: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Stash new keys [B, H, q, D] and values and hand on what the model's attention shall see.

        grown: dense keys and values with the new ones behind them, where a fan-out has made them for all its arms.
        """
        if self._pending is not None:
            raise UnsupportedModelError(HANDLE_LOST)
        if not self.cache.is_served:
            raise KvpressError(
                "this cache is closed, so the model would not see what it holds: keep the `kvpress.compress` context (or "
                "the CompressedCache it was made with) open while the model runs"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_states, value_states = key_states.detach(), value_states.detach()  # nothing is learned through a cache
        if self.plan.probing:
            keys, values = self.storage.extended(key_states, value_states)
            self._pending = (keys, values)
            return self._with_handle(keys), values
        if self.plan.static_columns is not None:  # the host counts after each replay (kvpress/graphs.py)
            self._pending = (key_states, value_states)
            return self._with_handle(key_states), value_states
        n_new = key_states.shape[2]
        self.cache.before_update(self, n_new)
        self.seen += n_new
        self._pending = (key_states, value_states)
        if self.storage.store is not None:
            return self._with_handle(key_states), value_states
        if grown is not None:
            self.storage.dense = grown
            return grown
        prompt = slice(0, self._prompt_part(n_new))
        if self.plan.defers or self.seen < (self.plan.prompt_length or 0):
            # tensors that stay for a while must not keep a fused projection of queries, keys and values alive
            key_states, value_states = own_storage(key_states), own_storage(value_states)
        self.storage.dense = self.storage.extended(key_states[:, :, prompt], value_states[:, :, prompt])
        return self._with_handle(self.storage.dense[0]), self.storage.dense[1]

    def _with_handle(self, keys: Tensor) -> Tensor:
        alias = keys.view(keys.shape)  # an own object: the stored tensor must not refer back to this layer
        setattr(alias, HANDLE, self)
        return alias

    def _prompt_part(self, n_new: int) -> int:
        """How many of the newest tokens belong to the prompt; a draft behind it attends to the cut cache.

        A decision that needs all layers comes too late for that: the draft is then read along with the prompt.
        """
        assert self.plan.prompt_length is not None
        if self.plan.defers:
            return n_new if self.seen - n_new < self.plan.prompt_length else 0
        return min(n_new, max(self.plan.prompt_length - (self.seen - n_new), 0))

    def attend(self, query: Tensor, mask: Tensor | None, user_attention: UserAttention, spec: LayerSpec) -> Tensor:
        """Attention of new queries over this cache, and eviction where the contract asks for it.

        Args:
            query: [B, Hq, q, D] after RoPE; mask: as the user's attention gets it.
            user_attention: the model's own implementation, for the prompt.
            spec: scale and the like.

        Returns:
            [B, q, Hq, Dv].
        """
        if self._pending is None:
            raise UnsupportedModelError(HANDLE_LOST)
        keys, values = self._pending
        self._pending, self.spec = None, spec
        if self.plan.probing:
            self.evidence.absorb_probe(self, query.detach(), keys, values)
            return user_attention(query, keys, values, mask)
        if self.plan.static_columns is not None:
            return self._attend_static(query, keys, values, self.plan.static_columns)
        n_new = query.shape[2]
        if mask is not None and (
            n_new > 1 or self.storage.store is None or self.seen <= (self.plan.prompt_length or 0)
        ):
            self.storage.note_padding(valid_columns(mask, self.storage.n_rows))
        split, first = self._prompt_part(n_new), self.seen - n_new
        outputs = []
        for part, in_prompt in ((slice(0, split), True), (slice(split, n_new), False)):
            if part.start < part.stop:
                queries = query[:, :, part]
                if self.storage.store is None:
                    outputs.append(self._attend_dense(queries, mask, user_attention))
                else:
                    outputs.append(
                        self._attend_packed(queries, keys[:, :, part], values[:, :, part], first + part.start)
                    )
                self._after_part(queries, first + part.start, in_prompt)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _attend_dense(self, query: Tensor, mask: Tensor | None, user_attention: UserAttention) -> Tensor:
        assert self.storage.dense is not None
        n_keys = self.storage.dense[0].shape[2]
        if mask is not None:  # a draft behind the prompt is masked off
            mask = mask[..., :n_keys] if mask.dim() == 2 else mask[:, :, : query.shape[2], :n_keys]
        return user_attention(query, *self.storage.dense, mask)

    def _attend_static(self, query: Tensor, keys: Tensor, values: Tensor, columns: Tensor) -> Tensor:
        """A decode step that runs on the device alone: nothing in it depends on what the host knows."""
        store = self.storage.store
        assert isinstance(store, PagedStore)
        store.append_reserved(keys, values, columns)
        return self._decode(store, query)

    def _decode(self, store: Store, query: Tensor) -> Tensor:
        grouped = self._grouped(query)
        return store.decode(grouped[..., 0, :], **self._options()).flatten(1, 2)[:, None]

    def _grouped(self, query: Tensor) -> Tensor:
        """[B, Hq, q, D] -> [B, H, G, q, D]."""
        assert self.spec is not None
        grouped: Tensor = query.detach().unflatten(1, (self.storage.n_heads, self.spec.group))
        return grouped

    def _options(self) -> dict[str, Any]:
        assert self.spec is not None
        sinks = None if self.spec.sinks is None else self.spec.sinks.flatten()
        return {"scale": self.spec.scale, "softcap": self.spec.softcap, "sinks": sinks}

    def _attend_packed(self, query: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
        self.storage.append(keys, values, first)
        store = self.storage.store
        assert store is not None
        if query.shape[2] == 1:
            return self._decode(store, query)
        columns = torch.arange(first, first + query.shape[2], device=query.device)
        out = store.attend(self._grouped(query), columns, **self._options())
        return out.flatten(1, 2).transpose(1, 2).contiguous()

    def _after_part(self, query: Tensor, first: int, in_prompt: bool) -> None:
        """Keep what the query law needs of these queries, and cut if this was the end of a chunk or of the prompt."""
        end, prompt = first + query.shape[2], self.plan.prompt_length
        assert prompt is not None
        if self.plan.observer is not None:
            self.plan.observer.saw(self, query.detach(), first)
        self.evidence.collect(self, query.detach(), first, in_prompt)
        if not in_prompt:
            return
        if end >= prompt:
            self.cache.prompt_read(self)
        elif self.plan.evicts and self.plan.contract.schedule.evicts_between_chunks:
            self.cache.cut([self], end)
        if self.evidence.queries:
            with self.plan.clock.measure("evidence", self.device):  # raw queries of a whole prompt outweigh its keys
                self.evidence.fold(self, min(end, prompt))

    # --- what transformers' cache interface asks for

    def get_seq_length(self) -> int:
        """The logical length: tokens seen, evicted ones and padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name in transformers before 5.23

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (a rejected draft); as in transformers the count is given as a negative number."""
        # up to transformers 5.15 a positive number was the length to keep
        n = -tokens_to_remove if tokens_to_remove <= 0 else max(self.seen - tokens_to_remove, 0)
        if n and self.is_initialized:
            self.seen -= n
            self.evidence.truncate(self.seen)
            self.storage.truncate(self.seen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select_rows([row for row in range(self.storage.n_rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._select_rows(rows.tolist())

    def join(self, parts: Sequence[CompressedLayer]) -> None:
        """Become the rows of several layers that have read equally much, one after the other."""
        first = parts[0]
        self.dtype, self.device, self.backend = first.dtype, first.device, first.backend
        self.seen, self.spec, self.is_initialized = first.seen, first.spec, True
        self.storage = first.storage.joined([part.storage for part in parts])

    def _select_rows(self, rows: list[int]) -> None:
        if self.is_initialized:
            self.storage.select_rows(rows)
            self.evidence.select_rows(rows)

    def offload(self) -> None:
        raise KvpressError("an offloaded cache keeps K and V on the CPU, which a compressed cache does not support")

    prefetch = offload
