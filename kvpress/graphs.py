"""Decode steps without launch overhead: one captured CUDA graph a step, replayed inside `model.generate`.

A step launches hundreds of small kernels, which costs more host time than the device needs at small batches. Over the
paged store nothing in a step depends on the host: lengths and page tables lie on the device, pages are handed out before
the step. So the model's forward pass is captured once and replayed, for as long as its tensors stay where they are:

    host, before the replay    hand out pages, copy the new token, its position and its column into static tensors
    device, the replay         the whole forward pass; it stores the token and counts it
    host, after the replay     count the token

Everything else of `generate` (sampling, stopping, streaming, beams) stays transformers' own. A step that cannot be
replayed runs as ever, and the report says how many did and why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvpress.cache.paged import PagedStore

if TYPE_CHECKING:
    from kvpress.cache import CompressedCache

#: arguments of a forward pass that ask for more than logits
EXTRA_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")


class CudaCapture:
    """How a step is tried and captured on a CUDA or ROCm device."""

    def obstacle(self, device: torch.device) -> str | None:
        """Why nothing can be captured on a device, or None."""
        return None if device.type == "cuda" else f"CUDA graphs need a CUDA or ROCm device, and this is '{device}'"

    def warm_up(self, step: Callable[[], None], device: torch.device) -> None:
        """Run a step so that everything is compiled; a step that waits for the device raises RuntimeError here.

        It must not get as far as a capture: one that fails half-way leaves stream and allocator of the process damaged.
        """
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.device(device):
                step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def capture(self, step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """Capture what a step launches, without running it; returns what runs it."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        with torch.cuda.device(device):
            try:
                # a stream of this device: the default one of torch.cuda.graph belongs to the first device that was used
                own = torch.cuda.Stream(device)
                with torch.cuda.graph(graph, stream=own, capture_error_mode="thread_local"):
                    step()
            finally:
                torch.cuda.set_stream(stream)
        return graph.replay


@dataclass
class GraphRecord:
    """How often the steps of a cache were captured and replayed, and how many ran eagerly for which reason.

    refusal: why a step of this model could not be captured; it is not tried again.
    """

    captured: int = 0
    replayed: int = 0
    eager: dict[str, int] = field(default_factory=dict)
    refusal: str | None = None


@dataclass
class _Captured:
    """A captured step, its static tensors, and all that it has built in and that must not change."""

    key: tuple[Any, ...]
    replay: Callable[[], None]
    ids: Tensor
    positions: Tensor
    columns: Tensor
    logits: Tensor


class GraphedForward:
    """Replays the decode steps of one cache; `forward` is the model's own."""

    def __init__(
        self, model: PreTrainedModel, forward: Callable[..., Any], cache: CompressedCache, capture: CudaCapture
    ) -> None:
        self.model, self.forward, self.cache, self.capture = model, forward, cache, capture
        self.record: GraphRecord = cache.plan.graphs
        self._step: _Captured | None = None

    def __call__(self, **inputs: Any) -> Any:
        """One forward pass: a replay where that is possible."""
        plan = self.cache.plan
        if plan.probing or self.cache.get_seq_length() < (plan.prompt_length or 1):
            return self.forward(**inputs)  # the prompt, or an extra pass over it
        reason = self._obstacle(inputs) or self.record.refusal
        if reason is None:
            logits = self._run(inputs)
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, past_key_values=self.cache)
            reason = self.record.refusal or "capturing the step failed"
        self.record.eager[reason] = self.record.eager.get(reason, 0) + 1
        return self.forward(**inputs)

    def _obstacle(self, inputs: dict[str, Any]) -> str | None:
        """Why this pass cannot be replayed, or None."""
        cache, ids, positions = self.cache, inputs.get("input_ids"), inputs.get("position_ids")
        if ids is None or ids.shape[1] != 1:
            return "not a decode step of one token a row"
        if positions is None:
            return "no position_ids were given"
        stores = _stores(cache)
        if not stores or any(backend.name != "triton" for backend in cache.plan.backends):
            return "only the Triton backend over the paged store keeps all lengths on the device"
        places = {store.device_lengths.device for store in stores} | {
            *getattr(self.model, "hf_device_map", {}).values()
        }
        if len({str(place) for place in places}) > 1:
            return "the model lies on several devices"
        if len(cache.compressed) < len(cache.layers):
            return "the sliding-window layers are transformers' own and change shape at every step"
        schedule = cache.contract.schedule
        if cache.plan.evicts and any(schedule.expects_eviction(x.steps_at_eviction) for x in cache.compressed_layers):
            return "the contract evicts while decoding"
        wanted = [name for name in EXTRA_OUTPUTS if inputs.get(name) or getattr(self.model.config, name, False)]
        if wanted or inputs.get("return_dict") is False:
            return f"a replay gives logits only, and {', '.join(wanted) or 'a tuple'} was asked for"
        others = inputs.keys() - {"input_ids", "position_ids", "past_key_values", "attention_mask"}
        tensors = sorted(name for name in others if isinstance(inputs[name], Tensor))
        if tensors:
            return f"the model takes {', '.join(tensors)} at every step"
        return self.capture.obstacle(ids.device)

    def _run(self, inputs: dict[str, Any]) -> Tensor | None:
        """Logits of a replayed step; None where it could not be captured, and then nothing has happened."""
        stores, layers = _stores(self.cache), self.cache.compressed_layers
        before, seen = [store.lengths for store in stores], self.cache.get_seq_length()
        try:
            return self._replayed(inputs, stores)
        except BaseException as error:  # also an interrupt: host and device must agree on what is stored
            self._step = self.cache.plan.static_columns = None
            for layer in layers:
                layer.seen, layer._pending = seen, None
            for store, lengths in zip(stores, before, strict=True):
                store.lengths = lengths
                store.reset_device_lengths()
            if not isinstance(error, RuntimeError):  # what a model may do that a graph cannot
                raise
            told = str(error.__context__ or error).strip() or type(error).__name__
            self.record.refusal = f"capturing the step failed: {told.splitlines()[0]}"
            return None

    def _replayed(self, inputs: dict[str, Any], stores: list[PagedStore]) -> Tensor:
        for store in stores:
            store.reserve([1] * len(store.lengths))
        ids, positions = inputs["input_ids"], inputs["position_ids"]
        options = sorted((name, repr(value)) for name, value in inputs.items() if not isinstance(value, Tensor | Cache))
        key = (ids.shape, positions.shape, *options, *(address for store in stores for address in store.addresses()))
        if self._step is None or self._step.key != key:
            self._step = None  # its memory is free for the next one
            self._step = self._captured(inputs, key)
        step = self._step
        step.ids.copy_(ids, non_blocking=True)
        step.positions.copy_(positions, non_blocking=True)
        step.columns.fill_(self.cache.get_seq_length())
        step.replay()
        for store in stores:
            store.advance([1] * len(store.lengths))
        for layer in self.cache.compressed_layers:
            layer.seen += 1
        self.record.replayed += 1
        return step.logits.clone()  # the next replay writes to the same tensor

    def _captured(self, inputs: dict[str, Any], key: tuple[Any, ...]) -> _Captured:
        ids, positions = inputs["input_ids"].clone(), inputs["position_ids"].clone()
        columns = torch.full((1,), self.cache.get_seq_length(), device=ids.device)
        rest = {
            name: value
            for name, value in inputs.items()
            if name not in ("input_ids", "position_ids", "attention_mask")  # stored tokens are never padding
        }
        logits: list[Tensor] = []

        def step() -> None:
            self.cache.plan.static_columns = columns
            try:
                found = self.forward(input_ids=ids, position_ids=positions, attention_mask=None, **rest).logits
            finally:
                self.cache.plan.static_columns = None
            if logits:
                logits[0].copy_(found)
            else:  # the run that warms up makes the tensor
                logits.append(found.clone())

        self.capture.warm_up(step, ids.device)
        for store in _stores(self.cache):
            store.reset_device_lengths()  # it has counted a token on the device
        replay = self.capture.capture(step, ids.device)
        self.record.captured += 1
        return _Captured(key, replay, ids, positions, columns, logits[0])


def _stores(cache: CompressedCache) -> list[PagedStore]:
    """The paged stores of all compressed layers; empty unless every layer has one."""
    stores = [layer.storage.store for layer in cache.compressed_layers]
    paged = [store for store in stores if isinstance(store, PagedStore)]
    return paged if len(paged) == len(stores) else []


@contextmanager
def graphed_decode(
    model: PreTrainedModel, cache: CompressedCache, capture: CudaCapture | None = None
) -> Iterator[None]:
    """Replay the decode steps of `cache` for as long as the context is open, if the cache was asked to."""
    if not cache.plan.request.graphs:
        yield
        return
    own = model.__dict__.get("forward")  # accelerate puts one there
    original = model.forward
    cache.plan.graphs = cache.plan.graphs or GraphRecord()
    graphed = GraphedForward(model, original, cache, capture or CudaCapture())

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if args or kwargs.get("past_key_values") is not cache:
            return original(*args, **kwargs)
        return graphed(**kwargs)

    model.forward = forward
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own
