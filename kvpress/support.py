"""Which models and layers can be compressed; everything else is refused by name, before any weight is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvpress.backend import BackendRequest
from kvpress.errors import ContractError, UnsupportedModelError

if TYPE_CHECKING:
    from kvpress.contract import Contract


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError, naming the model and the reason, if its cache cannot be compressed."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{name} is no transformers model; load one with kvpress.load or AutoModelForCausalLM"
        )
    config = model.config
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; only decoder-only models are supported")
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{name} uses multi-head latent attention (kv_lora_rank={text.kv_lora_rank}): its cache holds one latent "
            f"for all heads, and selectors per KV head have no meaning there"
        )
    if getattr(text, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(f"{name} shares keys and values between layers, which is not supported")
    if not _has_kv_heads(text):
        raise UnsupportedModelError(
            f"{name} names no num_key_value_heads; models with ordinary (grouped-query) attention are supported"
        )
    if not (model._supports_attention_backend or model._can_set_attn_implementation()):
        raise UnsupportedModelError(
            f"{name} does not use transformers' attention interface, so its attention cannot be served"
        )
    if "flex" in (config._attn_implementation or ""):
        raise UnsupportedModelError(
            f"{name} runs flex_attention, whose block masks the compressed cache cannot read: use sdpa, eager or flash attention"
        )
    layers, _ = _own_layers(model)
    odd = sorted({type(layer).__name__ for layer in layers if not _is_attention(layer)})
    if odd:
        kinds = sorted(
            {
                kind
                for kind in getattr(text, "layer_types", None) or []
                if kind not in ("full_attention", "sliding_attention")
            }
        )
        raise UnsupportedModelError(
            f"{name} is a hybrid with layers that are no ordinary attention ({', '.join(kinds or odd)}); "
            f"only full and sliding-window attention layers are supported"
        )


def kv_heads(config: Any, layer: int) -> int:
    """KV heads of a layer, from the layer's own config where a model's layers differ."""
    own = getattr(config, "per_layer_config", None)
    return int((own[layer] if own else config).num_key_value_heads)


def _has_kv_heads(config: Any) -> bool:
    try:
        return kv_heads(config, 0) > 0
    except (AttributeError, TypeError):
        return False


def cache_layers(model: PreTrainedModel) -> tuple[list[Any], list[int]]:
    """The layers of transformers' own cache for the model, and the indices of those that will be compressed."""
    check_model(model)
    return _own_layers(model)


def _own_layers(model: PreTrainedModel) -> tuple[list[Any], list[int]]:
    config = model.config.get_text_config(decoder=True)
    layers = list(DynamicCache(config=config).layers) or [DynamicLayer() for _ in range(config.num_hidden_layers)]
    return layers, [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]


def _is_attention(layer: Any) -> bool:
    return type(layer) is DynamicLayer or type(layer).__name__ == "DynamicSlidingWindowLayer"


def check_backend(backend: str | BackendRequest, model: PreTrainedModel) -> BackendRequest:
    """The request behind a backend's name. Raise InputError if Triton was asked for by name and cannot serve the model."""
    request = backend if isinstance(backend, BackendRequest) else BackendRequest(backend)
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    request.resolve(model.device, model.dtype, (head_dim,))
    return request


def check_contract_fits(
    contract: Contract, model: PreTrainedModel, compressed: Sequence[int], reference: Tensor | None
) -> None:
    """Raise ContractError if the contract asks for something that this model or call does not have."""
    name = type(model).__name__
    if not compressed and not contract.budget.keeps_everything:
        raise ContractError(
            f"every attention layer of {name} slides over a window, so contract '{contract.name}' has nothing to "
            f"compress: use preset 'full'"
        )
    if contract.query_law.origin == "oracle" and contract.ranking.statistics and reference is None:
        raise ContractError(
            f"contract '{contract.name}' reads the queries of a reference answer: give its token ids as reference=[B, m]"
        )
    layers = getattr(contract.access, "layers", ())
    if layers and max(layers) >= len(compressed):
        raise ContractError(
            f"access layers go up to {max(layers)}, but {name} has {len(compressed)} compressed layers (counted from 0)"
        )
