"""CompressedCache: a transformers cache whose bytes are really gone.

cache = kvpress.CompressedCache(model, "snapkv")
model.generate(**inputs, past_key_values=cache)
print(cache.nbytes, cache.report())
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvpress.attach import attach, detach, is_attached
from kvpress.backend import BackendRequest
from kvpress.cache.formats import layer_formats
from kvpress.cache.layer import HANDLE_LOST, CompressedLayer
from kvpress.cache.plan import Plan
from kvpress.cache.problems import problems
from kvpress.contract import Contract, resolve
from kvpress.errors import KvpressError, UnsupportedModelError
from kvpress.report import Report, decision_record, make_report
from kvpress.selection import combined, decide, score
from kvpress.support import cache_layers, check_backend, check_contract_fits, kv_heads


class CompressedCache(Cache):
    """Cache of one batch of sequences under one contract.

    Full-attention layers are compressed; sliding-window layers keep transformers' own layer. The model answers to
    this cache for as long as it is open (`close`, a `with` block, or its garbage collection ends that).

    Args:
        model: a decoder-only transformers model.
        contract: preset name, YAML path, mapping or Contract; budget: replaces the contract's budget.
        tokenizer: for query_law `reconstruction`, whose instruction is text; found by itself after `kvpress.load`.
        reference: [B, m] token ids of the reference continuation, for query_law `oracle`.
        backend: "auto", "torch", "triton", or a BackendRequest that also names the store and the page size.

    Raises:
        InputError: the backend cannot serve this model here.
        UnsupportedModelError: the model's attention cannot be compressed.
        ContractError: the contract does not exist or does not fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        contract: str | dict[str, Any] | Contract,
        *,
        budget: Any = None,
        tokenizer: Any = None,
        reference: Tensor | None = None,
        backend: str | BackendRequest = "auto",
    ) -> None:
        self.contract = resolve(contract, budget)
        layers, self.compressed = cache_layers(model)
        check_contract_fits(self.contract, model, self.compressed, reference)
        config = model.config.get_text_config(decoder=True)
        n_heads = sum(kv_heads(config, index) for index in self.compressed)
        formats = layer_formats(self.contract.representation, model, len(self.compressed))
        self.plan = Plan(self.contract, len(self.compressed), n_heads, check_backend(backend, model), formats=formats)
        for place, index in enumerate(self.compressed):
            layers[index] = CompressedLayer(self.plan, self, index, place)
        super().__init__(layers=layers)
        self.tokenizer, self.reference = tokenizer, reference
        self.prompt_ids: Tensor | None = None
        self.prompt_mask: Tensor | None = None
        self._waiting_for_probe = False
        attach(model)
        self._model = weakref.ref(model)
        self._detach = weakref.finalize(self, detach, model)

    def close(self) -> None:
        """Stop serving: the model is as it was before. The stored tensors stay readable."""
        self._detach()

    @property
    def is_served(self) -> bool:
        """Whether the model is attached, by this cache or by anyone else."""
        model = self._model()
        return model is not None and is_attached(model)

    def __enter__(self) -> CompressedCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        """The compressed layers, in order."""
        return [self.layers[index] for index in self.compressed]

    @property
    def _other_layers(self) -> list[Any]:
        """The sliding-window layers, which are transformers' own."""
        return [layer for index, layer in enumerate(self.layers) if index not in set(self.compressed)]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that this cache owns: keys, values, positions, slack, free pages, kept queries, other layers."""
        own = sum(layer.nbytes for layer in self.compressed_layers)
        idle = sum(pool.idle_bytes + pool.pages.anchor.nbytes for pool in self.plan.pools.values())
        return own + idle + self.other_nbytes

    @property
    def other_nbytes(self) -> int:
        """Of `nbytes`, what the layers hold that are not compressed."""
        tensors = [t for layer in self._other_layers for t in (layer.keys, layer.values) if isinstance(t, Tensor)]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    @property
    def prompt_length(self) -> int | None:
        """Columns of the input at which this turn's prompt ends."""
        return self.plan.prompt_length

    def begin_prompt(self, length: int) -> None:
        """Announce that the prompt of the coming turn ends at column `length` (padding included).

        `generate` says so by itself. Say so before a chunked prefill by hand; a plain forward pass that nobody
        announced counts as the whole prompt, and everything after it as decoding.
        """
        if length <= self.get_seq_length():
            return
        self.plan.prompt_length = length
        for layer in self.compressed_layers:
            layer.steps_at_eviction = None

    def reset(self) -> None:
        """Forget all tokens, as if nothing had been read."""
        super().reset()
        self.plan.restart()
        self.prompt_ids = self.prompt_mask = None
        self._waiting_for_probe = False

    def freeze(self) -> None:
        """Evict nothing from here on: what follows is stored in full (a question about a compressed context, say).

        Together with `crop` this answers several questions from one compressed context:

            model(context_ids, past_key_values=cache)
            cache.freeze()
            for question_ids in questions:
                answer = model.generate(torch.cat([context_ids, question_ids], 1), past_key_values=cache)
                cache.crop(context_ids.shape[1] - cache.get_seq_length())
        """
        self.plan.frozen = True
        for layer in self.compressed_layers:
            layer.evidence.clear()
        for layer in self._other_layers:  # so that a sliding layer can go back to here
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, given as a negative number.

        Raises:
            KvpressError: a sliding-window layer has already let go of what would come back; no layer is changed.
        """
        for layer in self._other_layers if tokens_to_remove else []:
            # older transformers (5.13) cannot record the past; there the layer itself says what it cannot do
            if layer.get_seq_length() >= layer.sliding_window and not getattr(layer, "record_past", True):
                raise KvpressError(
                    f"the sliding-window layers ({layer.sliding_window} tokens) have let go of what crop would bring back: "
                    f"call cache.freeze() (or activate_past_recording) before the tokens that will be cropped"
                )
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx.cpu())  # one copy to the host, not one for each layer

    def report(self) -> Report:
        """What was kept where, at which cost in bytes and seconds."""
        return make_report(self)

    # --- called by the layers -------------------------------------------------------------------------------------

    def before_update(self, layer: CompressedLayer, n_new: int) -> None:
        """Evict if a decode step is due: drafts that were rejected are gone by now, and every layer is at one length."""
        if self.plan.prompt_length is None:
            self.plan.prompt_length = layer.seen + n_new
        if layer.storage.store is None or not self.plan.evicts_in_decode:
            return
        steps = layer.seen - self.plan.prompt_length
        if steps >= 0 and self.contract.schedule.due(steps, layer.steps_at_eviction):
            self.cut(self.compressed_layers if self.plan.needs_all_layers else [layer], layer.seen)

    def prompt_read(self, layer: CompressedLayer) -> None:
        """A layer has attended to the last token of the prompt: cut it, pack it, or wait for the others."""
        later_turn = layer.storage.store is not None
        cuts = self.plan.evicts and self.contract.schedule.evicts_at_prefill_end
        if not cuts or (self.plan.needs_probe and later_turn):
            self.plan.turns_in_full += cuts and layer.place == 0
            layer.storage.keep(None, layer.seen)
        elif self.plan.needs_probe:
            self._waiting_for_probe = True
        elif not self.plan.needs_all_layers:
            self.cut([layer], self._prompt_end())
        elif layer.place == self.plan.n_layers - 1:
            self.cut(self.compressed_layers, self._prompt_end())

    def cut(self, layers: Sequence[CompressedLayer], limit: int) -> None:
        """Bring layers down to the budget; only tokens in columns before `limit` are looked at."""
        clock, device = self.plan.clock, layers[0].device
        self.plan.held_all_layers |= self.plan.defers
        with clock.measure("evidence", device):
            asked = []
            for layer in layers:
                layer.evidence.fold(layer, limit)
                asked.append(problems(layer, limit))
            # a row that is still all padding in the first chunks has nothing to decide
            rows = [
                [score(self.contract, layer[row], self.plan.observer is not None) for layer in asked]
                if layers[0].storage.real_tokens(row, limit)
                else []
                for row in range(layers[0].storage.n_rows)
            ]
        with clock.measure("eviction", device):
            decisions = [decide(self.contract, row) if row else None for row in rows]
            for at, layer in enumerate(layers):
                for row, decided in enumerate(decisions):
                    if decided is None:
                        continue
                    record = decision_record(decided[at], asked[at][row])
                    self.plan.decisions[(layer.index, row)] = record
                    if self.plan.observer is not None:
                        self.plan.observer.decided(layer, row, combined(self.contract, rows[row])[at], decided[at])
                nothing = [torch.empty(0, dtype=torch.long, device=layer.device)] * layer.storage.n_heads
                layer.storage.keep([nothing if row is None else row[at].kept for row in decisions], limit)
                layer.steps_at_eviction = max(layer.seen - self._prompt_end(), 0)
                layer.evidence.clear_after_cut(layer)

    def _prompt_end(self) -> int:
        assert self.plan.prompt_length is not None
        return self.plan.prompt_length

    # --- called by the hooks on the model --------------------------------------------------------------------------

    def note_inputs(self, input_ids: Tensor | None, mask: Tensor | None) -> None:
        """Remember the prompt's ids [B, n] and 2-D mask, which an extra pass over the context needs."""
        if not self.plan.needs_probe or self.plan.probing:
            return
        prompt = self.plan.prompt_length
        if input_ids is not None and (prompt is None or self.get_seq_length() < prompt):
            self.prompt_ids = input_ids if self.prompt_ids is None else torch.cat([self.prompt_ids, input_ids], 1)
            self.prompt_mask = mask

    def start_forward(self, model: PreTrainedModel) -> None:
        """A forward pass of the model begins."""
        if self.plan.probing:
            return
        if len({layer.seen for layer in self.compressed_layers}) > 1:
            raise KvpressError(
                "a forward pass over this cache stopped half-way, so its layers differ: call cache.reset()"
            )
        self.plan.clock.start_forward(model.device)

    def end_forward(self, model: PreTrainedModel) -> None:
        """A forward pass is over: book its time, run the extra pass that the query law asks for, then cut."""
        if self.plan.probing:
            return
        if any(layer._pending is not None for layer in self.compressed_layers):
            raise UnsupportedModelError(HANDLE_LOST)
        in_prompt = self.get_seq_length() <= (self.plan.prompt_length or 0)
        self.plan.clock.end_forward("prefill" if in_prompt else "decode", model.device)
        self.probe_if_due(model)

    def probe_if_due(self, model: PreTrainedModel) -> None:
        """Where the prompt has been read and the evidence needs an extra forward pass: run it, then cut."""
        if self._waiting_for_probe:
            from kvpress.probe import run_probe

            self._waiting_for_probe = False
            with self.plan.clock.measure("evidence", model.device):
                run_probe(model, self)
            if self.plan.needs_all_layers:
                self.cut(self.compressed_layers, self._prompt_end())
            else:
                for layer in self.compressed_layers:
                    self.cut([layer], self._prompt_end())
