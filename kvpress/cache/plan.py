"""What the layers of one cache share: the contract, the prompt's length, the model's shape, and the clock."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvpress.backend import Backend, BackendRequest
from kvpress.cache.formats import LayerFormat
from kvpress.cache.observer import Observer
from kvpress.cache.shared_statistics import SharedStatistics
from kvpress.contract import Contract
from kvpress.errors import InputError
from kvpress.slots.access import Aggregate
from kvpress_kernels.page_pool import PagePool
from kvpress_kernels.pages import PageLayout


@dataclass
class Clock:
    """Seconds spent per phase; on a GPU a phase ends when the device has finished it."""

    prefill: float = 0.0
    evidence: float = 0.0
    eviction: float = 0.0
    decode: float = 0.0
    decode_steps: int = 0
    _started: tuple[float, float] | None = None
    _start_event: Any = None
    _events: list[tuple[Any, Any, float]] = field(default_factory=list)

    @contextmanager
    def measure(self, phase: str, device: torch.device) -> Iterator[None]:
        """Add the time of the block to `phase`."""
        _finish(device)
        start = time.perf_counter()
        try:
            yield
        finally:
            _finish(device)
            setattr(self, phase, getattr(self, phase) + time.perf_counter() - start)

    def start_forward(self, device: torch.device) -> None:
        """Note the time; evidence and eviction that happen inside the pass are booked on their own."""
        self._started = (time.perf_counter(), self.evidence + self.eviction)
        if device.type == "cuda":
            self._start_event = torch.cuda.Event(enable_timing=True)
            self._start_event.record(torch.cuda.current_stream(device))

    def end_forward(self, phase: str, device: torch.device) -> None:
        """Book the pass under "prefill" or "decode".

        A decode step on a GPU is not waited for, so that the host may run ahead: events on the device take its time, and
        `to_dict` adds them up.
        """
        if self._started is None:
            return
        start, own = self._started
        if device.type == "cuda" and phase == "decode":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(device))
            self._events.append((self._start_event, event, self.evidence + self.eviction - own))
            if len(self._events) > 256 and self._events[0][1].query():
                self._fold(1)
            self.decode_steps += 1
            self._started = None
            return
        _finish(device)
        spent = time.perf_counter() - start - (self.evidence + self.eviction - own)
        setattr(self, phase, getattr(self, phase) + spent)
        self.decode_steps += phase == "decode"
        self._started = None

    def to_dict(self) -> dict[str, float]:
        """Seconds by phase; waits for the decode steps that a GPU has not finished."""
        self._fold(len(self._events))
        return {phase: getattr(self, phase) for phase in ("prefill", "evidence", "eviction", "decode")}

    def _fold(self, n: int) -> None:
        """Book the n oldest decode steps, less the evidence and eviction inside them."""
        for start, end, own in self._events[:n]:
            end.synchronize()
            self.decode += start.elapsed_time(end) / 1e3 - own
        del self._events[:n]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Plan:
    """Shared state of one cache.

    prompt_length: columns of the input at which the prompt of this turn ends, None before anyone said so.
    turns_in_full: later prompts that were not cut, because their evidence would need another extra pass.
    frozen: nothing is evicted any more; held_all_layers: a decision had to wait until every layer was there in full.
    n_layers: compressed layers; n_heads_total: their KV heads.
    request: the backend that was asked for; backends: those in use; pools: where paged layers get their pages. formats: how each compressed
    layer stores a token.
    """

    contract: Contract
    n_layers: int
    n_heads_total: int = 0
    request: BackendRequest = field(default_factory=BackendRequest)
    prompt_length: int | None = None
    turns_in_full: int = 0
    frozen: bool = False
    held_all_layers: bool = False
    probing: bool = False
    probe_valid: Any = None  # [B, q] bool on the host while a padded batch is probed
    clock: Clock = field(default_factory=Clock)
    decisions: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    backends: set[Backend] = field(default_factory=set)
    static_columns: Any = None  # [1] on the device while a decode step is captured
    observer: Observer | None = None
    shared: SharedStatistics | None = None  # while a fan-out reads the prompt
    graphs: Any = None  # what became of the steps that should be replayed (kvpress/graphs.py)
    pools: dict[tuple[torch.device, PageLayout], PagePool] = field(default_factory=dict)
    formats: Sequence[LayerFormat] = ()

    def backend_for(self, keys: torch.Tensor, values: torch.Tensor) -> Backend:
        """The backend of a layer with keys and values like these, noted for the report."""
        request = self.request
        cast = any(form.dtype not in (None, torch.int8) for form in self.formats)
        if cast and (request.backend, request.store) == ("auto", "auto"):
            request = replace(request, store="packed", graphs=False)
        backend = request.resolve(keys.device, keys.dtype, (keys.shape[-1], values.shape[-1]))
        if backend.store == "paged" and cast:
            raise InputError(
                "the paged store keeps the model's dtype or int8: use store 'packed' with another dtype of the representation"
            )
        self.backends.add(backend)
        return backend

    def pool(self, device: torch.device, layout: PageLayout) -> PagePool:
        """The pool that all layers of this layout and device share; pools of one device and dtype count from one anchor, so that a
        kernel finds the pages of all of them."""
        if (device, layout) not in self.pools:
            alike = (
                pool for (where, other), pool in self.pools.items() if (where, other.dtype) == (device, layout.dtype)
            )
            first = next(alike, None)
            self.pools[(device, layout)] = PagePool(layout, device, None if first is None else first.pages.anchor)
        return self.pools[(device, layout)]

    def restart(self) -> None:
        """Forget the turn, the decisions and the times."""
        self.prompt_length, self.turns_in_full = None, 0
        self.frozen = self.held_all_layers = False
        self.clock, self.decisions = Clock(), {}
        self.backends, self.pools, self.graphs = set(), {}, None

    @property
    def evicts(self) -> bool:
        """False when nothing will be looked at or evicted: the budget is the whole prompt, or the cache is frozen."""
        return not self.frozen and not self.contract.budget.keeps_everything

    @property
    def needs_all_layers(self) -> bool:
        """Whether a decision needs the scores of all layers."""
        access = self.contract.access
        wide = isinstance(access, Aggregate) and access.scope == "model"
        return self.evicts and (wide or self.contract.allocation.needs_all_layers)

    @property
    def needs_probe(self) -> bool:
        """Whether the evidence comes from an extra forward pass after the prompt."""
        law = self.contract.query_law
        return self.evicts and bool(self.contract.ranking.statistics) and law.origin in ("reconstruction", "oracle")

    @property
    def defers(self) -> bool:
        """Whether every layer stays in full until the last one has read the prompt."""
        return self.needs_all_layers or self.needs_probe

    @property
    def evicts_in_decode(self) -> bool:
        """Whether queries of decode steps may be evidence of a later eviction."""
        return self.evicts and self.contract.schedule.evicts_in_decode
