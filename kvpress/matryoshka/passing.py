"""A cache that keeps nothing: one forward pass over whole windows of text, in which each compressed layer's attention is watched or
changed. It reaches the attention by the same way as a compressed cache (kvpress/attention.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from kvpress.attach import HANDLE, UserAttention, attach, detach
from kvpress.errors import UnsupportedModelError
from kvpress.evidence import LayerSpec
from kvpress.support import cache_layers
from kvpress_kernels.dispatch import BackendName

#: (place among the compressed layers, query [B, Hq, q, D], keys [B, H, q, D], values, the model's own attention, spec) -> [B, q, Hq, Dv]
Attend = Callable[[int, Tensor, Tensor, Tensor, Callable[[Tensor, Tensor, Tensor], Tensor], LayerSpec], Tensor]


class PassingLayer(CacheLayerMixin):
    """One attention layer; `attend` does what the owner asks. Gradients flow through it."""

    is_compileable = False
    is_sliding = False
    served_by: BackendName = "torch"
    reads_output_weight = False

    def __init__(self, index: int, place: int, attend: Attend) -> None:
        super().__init__()
        self.index, self.place, self._attend = index, place, attend
        self.n_heads = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.n_heads = key_states.shape[1]
        self._pair = key_states, value_states
        alias = key_states.view(key_states.shape)
        setattr(alias, HANDLE, self)
        return alias, value_states

    def attend(self, query: Tensor, mask: Tensor | None, user_attention: UserAttention, spec: LayerSpec) -> Tensor:
        keys, values = self._pair
        del self._pair

        def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return user_attention(q, k, v, mask)

        return self._attend(self.place, query, keys, values, own, spec)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a passing layer holds nothing")

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name in transformers before 5.23


class Passing(Cache):
    """The layers of one pass; sliding-window layers are transformers' own."""

    def __init__(self, model: PreTrainedModel, attend: Attend) -> None:
        layers, compressed = cache_layers(model)
        for place, index in enumerate(compressed):
            layers[index] = PassingLayer(index, place, attend)
        super().__init__(layers=layers)


@contextmanager
def attached(model: PreTrainedModel) -> Iterator[None]:
    """Have the model's attention ask the layers of a `Passing` cache."""
    attach(model)
    try:
        yield
    finally:
        detach(model)


def read_window(model: PreTrainedModel, ids: Tensor, attend: Attend, **kwargs: Any) -> Tensor:
    """Logits [B, n, vocabulary] of windows ids [B, n], each from an empty cache; the model must be `attached`."""
    output = model(input_ids=ids, past_key_values=Passing(model, attend), use_cache=True, **kwargs)
    logits: Tensor = output.logits
    return logits


def compressed_shapes(model: PreTrainedModel) -> tuple[tuple[int, ...], list[tuple[int, int, int]]]:
    """Indices of the compressed layers, and (KV heads, D, Dv) of each, from one pass over two tokens."""
    import torch

    shapes: dict[int, tuple[int, int, int]] = {}
    _, compressed = cache_layers(model)
    if not compressed:
        raise UnsupportedModelError(
            f"every attention layer of {type(model).__name__} slides over a window, so there is nothing to project"
        )

    def look(place: int, q: Tensor, k: Tensor, v: Tensor, own: Any, spec: LayerSpec) -> Tensor:
        shapes[place] = (k.shape[1], k.shape[-1], v.shape[-1])
        found: Tensor = own(q, k, v)
        return found

    with torch.no_grad(), attached(model):
        read_window(model, torch.zeros(1, 2, dtype=torch.long, device=model.device), look)
    return tuple(compressed), [shapes[place] for place in range(len(compressed))]


__all__: Sequence[str] = ("Attend", "Passing", "attached", "compressed_shapes", "read_window")
