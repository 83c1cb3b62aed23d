"""The attention functions that serve a compressed cache, registered beside the user's own.

For each implementation X that a model uses there is one named `kvpress_X` in transformers' registries, with the mask
function of X. Where the keys come from a compressed layer it lets that layer attend, giving it X for the prompt;
anything else goes to X unchanged, so that an attached model without a compressed cache behaves as before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpress.attach import HANDLE, PREFIX
from kvpress.errors import UnsupportedModelError
from kvpress.evidence import LayerSpec


def wrapped_name(implementation: str) -> str:
    """Register the wrapper of an attention implementation and return its name."""
    name = PREFIX + implementation
    if name not in AttentionInterface._global_mapping:
        if implementation not in AttentionMaskInterface._global_mapping:
            raise UnsupportedModelError(
                f"attention implementation '{implementation}' has no mask function in transformers' registry, so padding "
                f"could not be told apart: register one with AttentionMaskInterface.register"
            )
        AttentionInterface.register(name, _make(implementation))
        # without a mask function of its own the name would get no mask at all, and padding would be attended
        AttentionMaskInterface.register(name, AttentionMaskInterface._global_mapping[implementation])
    return name


def _make(implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def kvpress_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        user = _users_function(implementation, module)
        layer = getattr(key, HANDLE, None)
        if layer is None:
            return user(module, query, key, value, attention_mask, **kwargs)
        if kwargs.get("position_bias") is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} adds a position bias to its attention, which the compressed cache does not serve"
            )

        def user_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return user(module, q, k, v, mask, **kwargs)[0]

        sinks = kwargs.get("s_aux")
        n_heads = layer.n_heads
        group = query.shape[1] // n_heads
        spec = LayerSpec(
            index=layer.index,
            group=group,
            scale=kwargs.get("scaling") or query.shape[-1] ** -0.5,
            softcap=kwargs.get("softcap"),
            sinks=None if sinks is None else sinks.view(n_heads, group),
            output_weight=_output_weight(module, query.shape[1]).unflatten(0, (n_heads, group))
            if layer.reads_output_weight
            else None,
            backend=layer.served_by,
        )
        return layer.attend(query, attention_mask, user_attention, spec), None

    return kvpress_attention


def _users_function(implementation: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The implementation as the model itself would call it; `eager` lives in the model's own file."""
    if implementation == "eager":
        home = sys.modules[type(module).__module__]
        function: Callable[..., tuple[Tensor, Tensor | None]] = home.eager_attention_forward
        return function
    found: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS[implementation]
    return found


def _output_weight(module: nn.Module, n_query_heads: int) -> Tensor:
    """W_O of an attention module as one [Dv, hidden] matrix per query head: [Hq, Dv, hidden], a view."""
    names = ("o_proj", "out_proj", "dense", "c_proj")
    projection = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no plain output projection (W_O), which this ranking reads: "
            f"use a ranking in value space, for example mii or vatp"
        )
    per_head: Tensor = weight.detach().T.unflatten(0, (n_query_heads, -1))
    return per_head
