"""Decode steps without launch overhead: one captured CUDA graph a step, replayed inside `model.generate`.

A step launches hundreds of small kernels, which costs more host time than the device needs at small batches. Over the
paged store nothing in a step depends on the host: lengths and page tables lie on the device, pages are handed out before
the step. So the model's forward pass is captured once and replayed, for as long as its tensors stay where they are:

    host, before the replay    hand out pages, copy the new token, its position and its column into static tensors
    device, the replay         the whole forward pass; it stores the token and counts it
    host, after the replay     count the token

Everything else of `generate` (sampling, stopping, streaming, beams) stays transformers' own. A step that cannot be
replayed runs as ever, and `reason` says why; the report shows it.
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
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvpress.cache.paged import PagedStore

if TYPE_CHECKING:
    from kvpress.cache import CompressedCache

#: (step) -> replay: prepares a step that can be repeated; the step itself has not run when it returns
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def capture_cuda(step: Callable[[], None]) -> Callable[[], None]:
    """Capture what a step launches as a CUDA graph. Its kernels must have been compiled by an earlier run."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@dataclass
class GraphRecord:
    """How often steps were captured and replayed, and how many ran eagerly for which reason."""

    captured: int = 0
    replayed: int = 0
    eager: dict[str, int] = field(default_factory=dict)


@dataclass
class _Captured:
    """A captured step, its static tensors, and the addresses that must not change."""

    addresses: tuple[Any, ...]
    replay: Callable[[], None]
    ids: Tensor
    positions: Tensor
    columns: Tensor
    logits: Tensor


class GraphedForward:
    """Replays the decode steps of one cache; `forward` is the model's own."""

    def __init__(self, forward: Callable[..., Any], cache: CompressedCache, capture: Capture = capture_cuda) -> None:
        self.forward, self.cache, self.capture = forward, cache, capture
        self.record = GraphRecord()
        self._step: _Captured | None = None
        self._failed: str | None = None

    def __call__(self, **inputs: Any) -> Any:
        """One forward pass: a replay where that is possible."""
        cache = self.cache
        if cache.get_seq_length() < (cache.plan.prompt_length or 1):
            return self.forward(**inputs)  # the prompt
        obstacle = self._obstacle(inputs)
        logits = self._run(inputs) if obstacle is None else None
        if logits is not None:
            return CausalLMOutputWithPast(logits=logits, past_key_values=cache)
        reason = obstacle or self._failed or ""
        self.record.eager[reason] = self.record.eager.get(reason, 0) + 1
        return self.forward(**inputs)

    def _obstacle(self, inputs: dict[str, Any]) -> str | None:
        """Why this pass cannot be replayed, or None."""
        cache, ids, positions = self.cache, inputs.get("input_ids"), inputs.get("position_ids")
        if ids is None or ids.shape[1] != 1 or positions is None:
            return "not a decode step of one token a row"
        if self.capture is capture_cuda and ids.device.type != "cuda":
            return f"CUDA graphs need a CUDA or ROCm device, and this is '{ids.device}'"
        if not _stores(cache) or any(backend.name != "triton" for backend in cache.plan.backends):
            return "only the Triton backend over the paged store keeps all lengths on the device"
        if len(cache.compressed) < len(cache.layers):
            return "the sliding-window layers are transformers' own and change shape at every step"
        if cache.plan.evicts_in_decode:
            return "the contract evicts while decoding, and every step's queries are its evidence"
        others = inputs.keys() - {"input_ids", "position_ids", "past_key_values", "attention_mask"}
        tensors = sorted(name for name in others if isinstance(inputs[name], Tensor))
        if tensors:
            return f"the model takes {', '.join(tensors)} at every step"
        return self._failed

    def _run(self, inputs: dict[str, Any]) -> Tensor | None:
        """Logits of a replayed step, or None with `_failed` set. The tensor is overwritten by the next step."""
        stores = _stores(self.cache)
        for store in stores:
            store.reserve([1] * len(store.lengths))
            store.work_list()
        addresses = (inputs["input_ids"].shape, *(address for store in stores for address in store.addresses()))
        if self._step is None or self._step.addresses != addresses:
            self._step = None  # its memory is free for the next one
            try:
                self._step = self._captured(inputs, addresses)
            except RuntimeError as error:  # what a model may do that a graph cannot: synchronise, depend on values
                self._failed = f"capturing the step failed: {str(error).splitlines()[0]}"
                return None
        step = self._step
        step.ids.copy_(inputs["input_ids"], non_blocking=True)
        step.positions.copy_(inputs["position_ids"], non_blocking=True)
        step.columns.fill_(self.cache.get_seq_length())
        step.replay()
        for store in stores:
            store.advance([1] * len(store.lengths))
        for layer in self.cache.compressed_layers:
            layer.seen += 1
        self.record.replayed += 1
        return step.logits

    def _captured(self, inputs: dict[str, Any], addresses: tuple[Any, ...]) -> _Captured:
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
            # the first pass fixes the tensor; a replay on the device writes to the same address by itself
            if logits:
                logits[0].copy_(found)
            else:
                logits.append(found)

        # a run compiles what is not compiled yet; what it counted on the device is put back
        step()
        for store in _stores(self.cache):
            store.reset_device_lengths()
        replay = self.capture(step)
        self.record.captured += 1
        return _Captured(addresses, replay, ids, positions, columns, logits[0])


def _stores(cache: CompressedCache) -> list[PagedStore]:
    """The paged stores of all compressed layers; empty unless every layer has one."""
    stores = [layer.storage.store for layer in cache.compressed_layers]
    paged = [store for store in stores if isinstance(store, PagedStore)]
    return paged if len(paged) == len(stores) else []


@contextmanager
def graphed_decode(model: PreTrainedModel, cache: CompressedCache, capture: Capture = capture_cuda) -> Iterator[None]:
    """Replay the decode steps of `cache` for as long as the context is open, if the cache was asked to."""
    if not cache.plan.request.graphs:
        yield
        return
    own = model.__dict__.get("forward")  # accelerate puts one there
    original = model.forward
    graphed = GraphedForward(original, cache, capture)
    cache.plan.graphs = graphed.record

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
