"""Attaching to a model: what is changed on it while a compressed cache is open, and put back afterwards.

Three things, all on the model object: the name of its attention implementation, two forward hooks, and a `generate`
that tells the cache where the prompt ends. Attachments are counted, so that several caches may share a model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvpress.errors import InputError
from kvpress.memory import explain_out_of_memory
from kvpress.prompt import context_length

if TYPE_CHECKING:
    from kvpress.session import Session


#: what the name of a wrapped attention implementation begins with
PREFIX = "kvpress_"
#: name of the attribute by which a key tensor carries its layer to the attention function
HANDLE = "_kvpress_layer"
#: (query [B, Hq, q, D], keys [B, H, n, D], values, mask) -> [B, q, Hq, Dv]: the model's own attention
UserAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass
class Attachment:
    """One attached model: how many users it has, what was there before, and the open sessions, newest last."""

    count: int = 0
    names: list[tuple[Any, str]] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)


#: attached models by id; an entry lives only while the model is attached, and its users hold the model
_attached: dict[int, Attachment] = {}
#: configs whose implementation is wrapped, with the number of attached models that share them
_wrapped_configs: dict[int, int] = {}


def attach(model: PreTrainedModel) -> Attachment:
    """Attach to a model, or count one more user of an attached one."""
    state = _attached.setdefault(id(model), Attachment())
    state.count += 1
    if state.count == 1:
        _wrap_attention(model, state)
        state.hooks = [
            model.register_forward_pre_hook(_before_forward, with_kwargs=True),
            model.register_forward_hook(_after_forward, with_kwargs=True),
        ]
        model.generate = functools.partial(_generate, model, model.generate)
    return state


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`; the last user restores the model."""
    state = _attached.get(id(model))
    if state is None:
        return
    state.count -= 1
    if state.count:
        return
    del _attached[id(model)]
    del model.generate  # the instance attribute; the class's own method is visible again
    for hook in state.hooks:
        hook.remove()
    for config, name in state.names:
        _wrapped_configs[id(config)] -= 1
        if not _wrapped_configs[id(config)]:
            del _wrapped_configs[id(config)]
            if (config._attn_implementation or "").startswith(PREFIX):  # else the user has chosen another one meanwhile
                config._attn_implementation_internal = name


def is_attached(model: PreTrainedModel) -> bool:
    """Whether anyone is attached to the model."""
    return id(model) in _attached


def _sessions(model: PreTrainedModel) -> list[Session]:
    """Open sessions on a model; a copy of an attached model has none."""
    state = _attached.get(id(model))
    return state.sessions if state is not None else []


def _wrap_attention(model: PreTrainedModel, state: Attachment) -> None:
    from kvpress.attention import wrapped_name

    configs = {
        id(m.config): m.config
        for m in model.modules()
        if hasattr(m, "config") and hasattr(m.config, "_attn_implementation")
    }
    for config in configs.values():
        name = (config._attn_implementation or "eager").removeprefix(PREFIX)
        state.names.append((config, name))
        _wrapped_configs[id(config)] = _wrapped_configs.get(id(config), 0) + 1
        # the internal attribute, as transformers itself sets it: the public one would re-check and re-dispatch
        config._attn_implementation_internal = wrapped_name(name)


def _before_forward(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from kvpress.cache import CompressedCache, FanOut

    if args:
        kwargs = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
        args = ()
    cache, input_ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
    sessions = _sessions(model)
    if cache is None and sessions and kwargs.get("use_cache") is not False and not model.training:
        cache = kwargs["past_key_values"] = sessions[-1].new_cache()
    if not isinstance(cache, CompressedCache | FanOut):
        return args, kwargs
    _check_call(model, kwargs)
    _check_device(model, input_ids)
    cache.note_inputs(input_ids, kwargs.get("attention_mask"))
    cache.start_forward(model)
    return args, kwargs


def _after_forward(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    from kvpress.cache import CompressedCache, FanOut

    cache = kwargs.get("past_key_values")
    if isinstance(cache, CompressedCache | FanOut):
        cache.end_forward(model)


def _check_device(model: PreTrainedModel, input_ids: Any) -> None:
    if hasattr(model, "hf_device_map"):  # accelerate moves the inputs of a dispatched model itself
        return
    home = model.get_input_embeddings().weight.device
    if isinstance(input_ids, Tensor) and input_ids.device != home:
        raise InputError(
            f"input_ids are on {input_ids.device}, but the model is on {home}: move them with .to('{home}')"
        )


def _check_call(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() > 2:
        raise InputError(
            f"a {mask.dim()}-D attention mask is not supported: the kept set differs between heads; give a 2-D mask of padding"
        )
    wanted = kwargs.get("output_attentions")
    if wanted or (wanted is None and getattr(model.config, "output_attentions", False)):
        raise InputError(
            "output_attentions is not supported: evicted tokens have no weights; use the session's report instead"
        )


def _generate(model: PreTrainedModel, generate: Any, *args: Any, **kwargs: Any) -> Any:
    """`model.generate` while attached: gives the session's cache, and tells it where the prompt ends."""
    from kvpress.cache import CompressedCache
    from kvpress.graphs import graphed_decode

    sessions = _sessions(model)
    cache = kwargs.get("past_key_values")
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    config = given or model.generation_config
    if cache is None and sessions:
        if kwargs.get("use_cache") is False or getattr(given, "use_cache", None) is False:
            raise InputError(
                "use_cache=False leaves nothing to compress: drop it, or leave the kvpress.compress context"
            )
        if kwargs.get("cache_implementation") or getattr(config, "cache_implementation", None):
            raise InputError(
                "cache_implementation conflicts with kvpress.compress, which brings its own cache: drop it"
            )
        cache = kwargs["past_key_values"] = sessions[-1].new_cache()
    if isinstance(cache, Cache) and not isinstance(cache, CompressedCache) and sessions:
        raise InputError(
            f"past_key_values is a {type(cache).__name__}, which kvpress.compress cannot compress: pass none, or a CompressedCache"
        )
    if not isinstance(cache, CompressedCache):
        return generate(*args, **kwargs)
    _check_call(model, kwargs)
    if kwargs.get("use_cache") is None and config.use_cache is False:
        kwargs["use_cache"] = True  # a saved default of many models; who compresses a cache wants one
    if getattr(config, "output_attentions", None):
        _check_call(model, {"output_attentions": True})
    length = _prompt_length(args, kwargs)
    _check_context(model, length)
    before = cache.prompt_length, cache.get_seq_length()
    cache.begin_prompt(length)
    try:
        with explain_out_of_memory(cache, length), graphed_decode(model, cache):
            return generate(*args, **kwargs)
    finally:
        if cache.get_seq_length() == before[1]:  # refused before the first forward pass: no prompt was read
            cache.plan.prompt_length = before[0]


def _prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Columns of the whole input: with a used cache the ids may be only the new ones, but the mask covers all."""
    given = [
        args[0] if args else None,
        *(kwargs.get(k) for k in ("inputs", "input_ids", "inputs_embeds", "attention_mask")),
    ]
    lengths = [tensor.shape[1] for tensor in given if isinstance(tensor, Tensor)]
    if not lengths:
        raise InputError("generate needs input_ids (or inputs_embeds) under kvpress.compress")
    return max(lengths)


def _check_context(model: PreTrainedModel, length: int) -> None:
    limit = context_length(model.config)
    if limit and length > limit:
        raise InputError(
            f"the prompt has {length:,} tokens, but {type(model).__name__} was made for {limit:,} (max_position_embeddings): shorten it"
        )
