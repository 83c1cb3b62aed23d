"""FanOut: one prefill that fills the caches of several contracts, and `join`, which decodes them as one batch.

    caches = [CompressedCache(model, name) for name in ("full", "snapkv", "mii")]
    first = model(input_ids, past_key_values=FanOut(caches)).logits[:, -1].argmax(-1)
    batch = join(caches)                                      # row i is caches[i]
    model(first.expand(3)[:, None], past_key_values=batch)    # one decode step of all three

A contract changes nothing about how the prompt itself is read: its attention runs over all of it, and only then is the
cache cut. So contracts can share that pass, each with its own decision; where the same queries are their evidence, its statistics are
computed once (`shared_statistics.py`). The prompt's keys and values exist once until the last arm has cut a layer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from kvpress.attach import HANDLE, UserAttention
from kvpress.cache.cache import CompressedCache
from kvpress.cache.layer import CompressedLayer
from kvpress.cache.shared_statistics import SharedStatistics, share_statistics, stop_sharing
from kvpress.cache.storage import own_storage
from kvpress.contract import Contract
from kvpress.errors import ContractError, KvpressError
from kvpress.evidence import LayerSpec
from kvpress_kernels.dispatch import BackendName


def shares_prefill(contract: Contract) -> bool:
    """Whether a contract reads the prompt as every other one does: it evicts nothing before the prompt's end."""
    return contract.budget.keeps_everything or not contract.schedule.evicts_between_chunks


def can_join(contract: Contract) -> bool:
    """Whether nothing is decided any more once the prompt has been cut, so that a joint batch can go on."""
    return contract.budget.keeps_everything or not contract.schedule.evicts_in_decode


class FanOut(Cache):
    """Cache of one prefill under several contracts; its arms are ordinary caches, ready to decode when the prompt is read.

    prefill_seconds: of the shared passes, without what the arms spent on evidence and eviction (those are in each arm's
    own report).

    Raises:
        ContractError: a contract evicts while the prompt is still being read.
        KvpressError: the caches are not fresh.
    """

    def __init__(self, arms: Sequence[CompressedCache]) -> None:
        for arm in arms:
            if not shares_prefill(arm.contract):
                raise ContractError(
                    f"contract '{arm.contract.name}' evicts between the chunks of a prompt, so it needs a prefill of its own"
                )
            if arm.get_seq_length():
                raise KvpressError("a fan-out begins with caches that have read nothing")
            arm.plan.pools = arms[0].plan.pools  # so that `join` can share pages
        self.arms = list(arms)
        self._shared = share_statistics(self.arms)
        n_layers = len(arms[0].layers)
        super().__init__(layers=[_FanOutLayer([arm.layers[i] for arm in arms], self._shared) for i in range(n_layers)])
        self.prefill_seconds = 0.0
        self._started = (0.0, 0.0)

    def begin_prompt(self, length: int) -> None:
        """Announce that the prompt ends at column `length`; needed before a prefill in chunks."""
        for arm in self.arms:
            arm.begin_prompt(length)

    def note_inputs(self, input_ids: Tensor | None, mask: Tensor | None) -> None:
        """Remember the prompt for the arms that read it a second time."""
        for arm in self.arms:
            arm.note_inputs(input_ids, mask)

    def start_forward(self, model: PreTrainedModel) -> None:
        """A forward pass of the model begins."""
        self._started = (time.perf_counter(), self._spent_by_arms())

    def end_forward(self, model: PreTrainedModel) -> None:
        """A forward pass is over: book its time, then run the extra passes of the arms that need one."""
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        start, own = self._started
        self.prefill_seconds += time.perf_counter() - start - (self._spent_by_arms() - own)
        first = self.arms[0]
        if first.get_seq_length() >= (first.plan.prompt_length or 0):
            stop_sharing(self.arms)
        for arm in self.arms:
            arm.probe_if_due(model)

    def _spent_by_arms(self) -> float:
        booked = sum(arm.plan.clock.evidence + arm.plan.clock.eviction for arm in self.arms)
        return booked - sum(shared.repeated for shared in self._shared)


class _FanOutLayer(CacheLayerMixin):
    """One layer of all arms: keys and values go to each, the attention is computed once."""

    is_compileable = False

    def __init__(self, layers: Sequence[Any], shared: Sequence[SharedStatistics]) -> None:
        super().__init__()
        self.layers, self.shared = list(layers), shared
        self.first = self.layers[0]
        self.is_sliding = self.first.is_sliding
        self.compressed = isinstance(self.first, CompressedLayer)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.compressed:
            seen = [layer.update(key_states, value_states, *args, **kwargs) for layer in self.layers]
            return tuple(seen[0])
        if self.first.storage.store is not None:
            raise KvpressError("a fan-out only reads the prompt: decode with its arms, or with `join`")
        keys, values = own_storage(key_states.detach()), own_storage(value_states.detach())
        grown = self.first.storage.extended(keys, values)
        for layer in self.layers:
            layer.update(keys, values, grown=grown)
        alias = grown[0].view(grown[0].shape)
        setattr(alias, HANDLE, self)
        return alias, grown[1]

    def attend(self, query: Tensor, mask: Tensor | None, user_attention: UserAttention, spec: LayerSpec) -> Tensor:
        """Attention of a chunk of the prompt, computed once; each arm takes its evidence and cuts when it is due."""
        computed: list[Tensor] = []

        def once(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
            if not computed:
                computed.append(user_attention(q, k, v, m))
            return computed[0]

        outputs: list[Tensor] = [layer.attend(query, mask, once, spec) for layer in self.layers]
        for shared in self.shared:
            shared.forget()
        return outputs[0]

    @property
    def n_heads(self) -> int:
        return int(self.first.n_heads)

    @property
    def index(self) -> int:
        return int(self.first.index)

    @property
    def served_by(self) -> BackendName:
        served: BackendName = self.first.served_by
        return served

    @property
    def reads_output_weight(self) -> bool:
        return any(layer.reads_output_weight for layer in self.layers)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("the arms' layers initialise themselves")

    def get_seq_length(self) -> int:
        return int(self.first.get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        sizes: tuple[int, int] = self.first.get_mask_sizes(query_length)
        return sizes

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name in transformers before 5.23


def join(caches: Sequence[CompressedCache], contract: str = "full") -> CompressedCache:
    """One cache whose rows are those of several caches that have read prompts of the same length; nothing more is evicted.

    Rows may be stored in different formats (slot `representation`). Pages are shared with the caches it is made of (copied when written to), packed tokens are copied.

    Raises:
        ContractError: a contract evicts again while decoding, so that its cache must go on alone.
        KvpressError: the caches have not read equally much, or hold padding.
    """
    for cache in caches:
        if not can_join(cache.contract):
            raise ContractError(f"contract '{cache.contract.name}' evicts while decoding: its cache cannot be joined")
    if len({cache.get_seq_length() for cache in caches}) != 1 or not caches[0].get_seq_length():
        raise KvpressError("only caches that have read prompts of one length can be joined")
    model = caches[0]._model()
    if model is None:
        raise KvpressError("the model of these caches is gone")
    joined = CompressedCache(model, contract, backend=caches[0].plan.request)
    joined.plan.pools = caches[0].plan.pools
    joined.plan.prompt_length = caches[0].get_seq_length()
    joined.freeze()
    for index, layer in enumerate(joined.layers):
        parts = [cache.layers[index] for cache in caches]
        if isinstance(layer, CompressedLayer):
            layer.join(parts)
        else:
            layer.__dict__.update(parts[0].__dict__)
            layer.keys = torch.cat([part.keys for part in parts])
            layer.values = torch.cat([part.values for part in parts])
    return joined
